"""Requests to buckets that fail: one line in place of what libraries raise.

Read `paths.py` for the operations that make them.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import TypeVar

GAVE_UP = ' retry attempts failed: '  # TensorStore's words for it
TRIES = 10  # how often `patiently` asks
T = TypeVar('T')
_LOG = logging.getLogger(__name__)
# Packages that raise errors about requests.
_LIBRARIES = (
  'gcsfs',
  'google',
  'aiohttp',
  'aiobotocore',
  'botocore',
  'requests',
  'urllib3',
)


class BucketError(OSError):
  """A request to a bucket that failed, after repeats where those help."""


class BucketRefused(BucketError):
  """A request that no repeat helps: without permission, or of a wrong name."""


def is_of_bucket(error: BaseException) -> bool:
  """Tells whether the libraries that speak to buckets raised an error."""
  ours = type(error).__module__.partition('.')[0] in _LIBRARIES
  # gcsfs raises a plain OSError or ValueError of the first two, and TensorStore
  # a ValueError of all.
  text = str(error)
  plain = text.startswith(('Forbidden: ', 'Bad Request: '))
  return ours or plain or GAVE_UP in text


def cause_in_bucket(error: BaseException) -> BaseException | None:
  """The error of a request that an error is, or that it comes from."""
  cause: BaseException | None = error
  while cause is not None:
    if is_of_bucket(cause) or isinstance(cause, BucketError):
      return cause
    cause = cause.__cause__ or cause.__context__
  return None


def bucket_error(
  error: BaseException, path: str | os.PathLike[str]
) -> BucketError | None:
  """One line in place of an error of the libraries that speak to buckets.

  None where the error is of another kind: what it says is meant for people, or
  for programmers.
  """
  if not is_of_bucket(error) and not isinstance(error, OSError):
    return None
  kind = type(error)
  text = ' '.join(str(error).split()) or kind.__name__
  if GAVE_UP in text:  # the answer to the request comes after it
    answer = re.search(r"http_response_code='(\d+)'", text)
    text = f'status {answer[1]}' if answer else text.rpartition(GAVE_UP)[2]
  code = str(getattr(error, 'code', ''))
  anonymous = 'Anonymous caller' in text or 'NoCredentials' in kind.__name__
  if code == '401' or anonymous:
    return BucketRefused(
      f'{path}: no credentials that it accepts: gcloud auth '
      'application-default login makes some, or aws configure for s3://'
    )
  if 'Forbidden' in text or isinstance(error, PermissionError):
    reason = text.partition('Forbidden: ')[2] or text
    return BucketRefused(f'{path}: no permission: {reason}')
  if code == '400' or text.startswith('Bad Request: '):
    reason = str(error).partition('\n')[2] or text
    return BucketRefused(f'{path}: the bucket refuses: {reason}')
  if isinstance(error, TimeoutError):
    return BucketError(f'{path}: no answer in time, after several tries')
  return BucketError(
    f'{path}: the request failed, after several tries where that helps: {text}'
  )


@contextlib.contextmanager
def requests_to(path: str | os.PathLike[str]) -> Iterator[None]:
  """Inside, what a bucket's libraries raise becomes a BucketError.

  A missing object stays a FileNotFoundError, and whatever is not about
  requests stays as it is.
  """
  try:
    yield
  except (FileNotFoundError, FileExistsError, BucketError):
    raise
  except Exception as error:
    worded = bucket_error(error, path) if '://' in os.fspath(path) else None
    if worded is None:
      raise
    raise worded from error


def patiently(action: Callable[[], T], tries: int = TRIES) -> T:
  """Does what a run cannot do without, also while a bucket is away for minutes.

  Args:
    action: asks a bucket, and raises BucketError after half a minute or so.
    tries: how often.
  """
  for _ in range(tries - 1):
    try:
      return action()
    except BucketRefused:
      raise
    except BucketError as error:
      _LOG.warning('%s: trying again', error)
  return action()
