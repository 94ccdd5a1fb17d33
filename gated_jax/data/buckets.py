"""Files in buckets, as fsspec reaches them: listed, and read by ranges.

What the storage says of a file when it is found is its `Entry`. Bytes that are
fetched later are those of that version, or an error. Read
`gated_jax/data/files.py` next.
"""

import contextlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from gated_jax.data.watch import FilesChangedError
from gated_jax.data.watch import FilesOutOfReachError
from gated_jax.paths import check_bucket
from gated_jax.paths import expand
from gated_jax.paths import file_system
from gated_jax.paths import requests_to

# Marks that tell one version of a file from another, surest first.
_MARKS = ('generation', 'ETag', 'etag', 'md5Hash', 'created', 'mtime')
# The same for contents: a file that is written once more is no other one.
_CONTENTS = ('md5Hash', 'crc32c', 'ETag', 'etag')
# The argument that asks a kind of storage for one version and no other.
_PINS = {'gs': 'generation'}


class Entry(NamedTuple):
  """A file in a bucket as it was when it was found."""

  size: int
  mark: str  # changes whenever it is written; '': the storage says nothing
  content: str  # changes with its contents alone, where there is such a mark
  pin: Mapping[str, Any]  # arguments with which this version alone is read


def entry(path: str) -> Entry:
  """A file as it is now.

  Raises:
    FileNotFoundError: it is not there.
    FilesOutOfReachError: the bucket does not answer, or refuses.
  """
  with _reaching(path) as files:
    return _entry(path, files.info(path))


def _entry(path: str, info: Mapping[str, Any]) -> Entry:

  def first(keys: tuple[str, ...]) -> str:
    """The first of some marks that the storage knows."""
    return next((str(info[key]) for key in keys if info.get(key)), '')

  mark = first(_MARKS)
  pin = _PINS.get(path.partition('://')[0])
  return Entry(
    int(info['size']),
    mark,
    first(_CONTENTS) or mark,
    {pin: info[pin]} if pin and info.get(pin) else {},
  )


def find(pattern: str) -> dict[str, Entry]:
  """Files that a glob matches; folders at any depth for `**`.

  Raises:
    ValueError: none does, or the bucket cannot be read.
  """
  check_bucket(expand(pattern))
  with _reaching(pattern) as files:
    infos = files.glob(pattern, detail=True)
    is_folder = not infos and files.isdir(pattern)
  scheme, _, name = pattern.partition('://')
  matches = {
    f'{scheme}://{match}': info
    for match, info in infos.items()
    if info['type'] == 'file' and _is_shown(match, name)
  }
  if not matches and (is_folder or infos):
    raise ValueError(
      f'{pattern!r} is a folder: say which of its files, as in '
      f"'{pattern.rstrip('/')}/*'"
    )
  if not matches:
    raise ValueError(f'no data files match {pattern!r}')
  return {path: _entry(path, info) for path, info in matches.items()}


def _is_shown(name: str, pattern: str) -> bool:
  """A wildcard matches no name that begins with a dot, as on a disk."""
  return '/.' in pattern or '/.' not in name


def fetch(path: str, known: Entry, begin: int, end: int) -> bytes:
  """Some bytes of the version of a file that is known.

  Raises:
    FilesChangedError: it is another one now.
    FilesOutOfReachError: the bucket does not answer, or refuses.
  """
  try:
    with _reaching(path) as files:
      data = files.cat_file(path, start=begin, end=end, **known.pin)
    # Without a pin, what is still the same afterwards has been so before.
    same = len(data) == end - begin and (bool(known.pin) or _is(path, known))
  except FileNotFoundError:
    same = False
  except FilesOutOfReachError:
    # A file that became shorter has no such bytes.
    if known.pin or _is(path, known):
      raise
    same = False
  if not same:
    raise FilesChangedError(
      f'{path} has changed since the run began to read it, or is gone'
    )
  return data


def _is(path: str, known: Entry) -> bool:
  """Tells whether a file is still the version that is known."""
  try:
    return entry(path) == known
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _reaching(path: str) -> Iterator[Any]:
  """The file system of a path, whose failures are FilesOutOfReachError."""
  place = expand(path)
  try:
    with requests_to(place):
      yield file_system(place)
  except FileNotFoundError:
    raise
  except OSError as error:
    raise FilesOutOfReachError(str(error)) from error
