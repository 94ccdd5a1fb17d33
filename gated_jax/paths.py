"""Paths as people type them: one rule for every command and every setting.

A path is a local one (`runs/x`, `~/runs/x`), or one in a bucket: `gs://...` of
Google Cloud Storage, `s3://...` of S3 and what speaks like it. `expand` makes
a `pathlib.Path` of the first and an `epath.Path` of the second, which have the
same methods; the functions below are for what is different in a bucket:

- it has no folders, only names with slashes, so an empty folder is not there;
- an object appears whole or not at all, and none can be appended to;
- every operation is a request, which takes tens of milliseconds and can fail.

Requests that are refused for a moment (429, 5xx), break off, or bring no byte
for PATIENCE seconds are repeated with back-off by the libraries below: half a
minute by gcsfs and s3fs and as often where each has to time out, longer by
TensorStore, which carries checkpoints. What fails after that, or is refused for
good, is a BucketError of one line; `requests_to` makes one of whatever those
libraries raise.
"""

import argparse
import glob as local_glob
import logging
import os
import pathlib
import shutil
from typing import Any
from typing import BinaryIO
from typing import TypeAlias

# With TensorFlow installed, epath would take its file systems for the libraries
# that the extras bring, and fail in other ways. It asks once, for all paths.
os.environ.setdefault('EPATH_USE_TF', 'false')

from etils import epath

from gated_jax.bucket_requests import BucketRefused
from gated_jax.bucket_requests import requests_to

Path: TypeAlias = pathlib.Path | epath.Path

# What each scheme needs: the extra of setup.py that brings it.
EXTRAS = {'gs': 'gcs', 's3': 's3'}
# Seconds without a byte after which a request counts as failed.
PATIENCE = 30


class NotAPath(ValueError, argparse.ArgumentTypeError):
  """What was typed cannot be a path; argparse shows what this says."""


def expand(path: str | os.PathLike[str]) -> Path:
  """The path that was typed, with `~` and `~name` as home folders.

  A relative path stays relative, so that it is printed as it was typed. Nothing
  is asked of a bucket here: see `check_bucket`.

  Raises:
    NotAPath: there is no such user, or nothing is known of a scheme.
    ImportError: what reads this kind of bucket is not installed.
  """
  text = os.fspath(path)
  scheme, separator, rest = text.partition('://')
  if separator:
    return _in_bucket(text, scheme, rest)
  if text.partition(':/')[0] in EXTRAS:
    raise NotAPath(f'{text!r} has lost a slash, as pathlib drops one: use text')
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise NotAPath(f'{text!r}: there is no such user') from None


def local(path: str | os.PathLike[str]) -> pathlib.Path:
  """Like `expand`, for what has to be on this machine.

  Raises:
    NotAPath: it is in a bucket, or there is no such user.
  """
  expanded = expand(path)
  if not isinstance(expanded, pathlib.Path):
    raise NotAPath(f'{path} is in a bucket: here a local path is needed')
  return expanded


def _in_bucket(text: str, scheme: str, rest: str) -> epath.Path:
  if scheme not in EXTRAS:
    known = ', '.join(f'{name}://' for name in EXTRAS)
    raise NotAPath(
      f'{text!r}: nothing is known of {scheme}://; paths are local or begin '
      f'with one of {known}'
    )
  if not rest.partition('/')[0]:
    raise NotAPath(f'{text!r} names no bucket, as {scheme}://bucket/x does')
  try:
    if scheme == 'gs':
      import gcsfs as backend
    else:
      import s3fs as backend
  except ImportError:
    raise ImportError(
      f"{text!r} needs packages: pip install 'gated_jax[{EXTRAS[scheme]}]'"
    ) from None
  _configure(backend.__name__)
  return epath.Path(text.rstrip('/'))


def _configure(backend: str) -> None:
  """Defaults of the library behind a scheme, below what the user has set."""
  from fsspec.config import conf

  settings = conf.setdefault('gcs' if backend == 'gcsfs' else 's3', {})
  # Other processes and libraries write to the same buckets, so a listing that
  # was made earlier says little.
  settings.setdefault('use_listings_cache', False)
  if backend == 'gcsfs':
    import aiohttp

    # A bound on the whole request, as a number would be, would fail large
    # objects on slow lines, and gcsfs repeats none of those requests.
    silence = aiohttp.ClientTimeout(sock_connect=PATIENCE, sock_read=PATIENCE)
    settings.setdefault('requests_timeout', silence)
  # TensorStore waits for ever, unless these are set before its first request.
  os.environ.setdefault(
    'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', f'{PATIENCE}'
  )
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
  # They print stack traces of errors that are raised all the same, and each way
  # to find credentials that found none.
  for name in (backend, 'fsspec', 'google.auth._default'):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def in_bucket(path: str | os.PathLike[str]) -> bool:
  """Tells whether a path, as typed or expanded, is one in a bucket."""
  return '://' in os.fspath(path)


def absolute(path: Path) -> Path:
  """The same path from the root; one in a bucket always is."""
  # epath takes the scheme for a folder.
  return path.absolute() if isinstance(path, pathlib.Path) else path


def file_system(path: Path) -> Any:
  """The fsspec file system of a path in a bucket, one for each kind."""
  from fsspec.core import url_to_fs

  return url_to_fs(os.fspath(path))[0]


def key_value_store(folder: Path) -> dict[str, str]:
  """How TensorStore names a folder: the spec of a KvStore."""
  scheme, separator, rest = os.fspath(folder).partition('://')
  if not separator:
    return {'driver': 'file', 'path': f'{folder.absolute()}/'}
  bucket, _, path = rest.partition('/')
  driver = 'gcs' if scheme == 'gs' else scheme
  below = f'{path}/' if path else ''
  return {'driver': driver, 'bucket': bucket, 'path': below}


def check_bucket(path: Path) -> None:
  """Asks for the bucket of a path; a local path passes.

  Raises:
    ValueError: it does not exist, or this user may not list it.
    BucketError: it cannot be reached.
  """
  if not in_bucket(path):
    return
  scheme, _, rest = os.fspath(path).partition('://')
  bucket = f'{scheme}://{rest.partition("/")[0]}'
  system = file_system(path)
  try:
    with requests_to(path):
      if scheme == 'gs':
        system.ls(bucket, detail=False, max_results=1)
      else:  # `exists` takes one that forbids for one that is not there
        name = bucket.partition('://')[2]
        system.call_s3('list_objects_v2', Bucket=name, MaxKeys=1)
  except FileNotFoundError:
    raise ValueError(f'{path}: there is no bucket {bucket}') from None
  except BucketRefused as error:
    raise ValueError(str(error)) from error


def size(path: Path) -> int:
  """Bytes of a file or an object."""
  if isinstance(path, pathlib.Path):
    return path.stat().st_size
  with requests_to(path):
    return path.stat().length


def exists(path: Path) -> bool:
  """Tells whether a path is a file, or a folder with something in it."""
  with requests_to(path):
    return path.exists()


def is_folder(path: Path) -> bool:
  """Tells whether a path is a folder; in a bucket, with something in it."""
  with requests_to(path):
    return path.is_dir()


def is_file(path: Path) -> bool:
  """Tells whether a path is a file or an object."""
  with requests_to(path):
    return path.is_file()


def open_for_reading(path: Path) -> BinaryIO:
  """A binary file to seek and read in; in a bucket each read asks for a range.

  Reads go ahead by some megabytes, so many small ones in order are few
  requests.
  """
  if isinstance(path, pathlib.Path):
    return path.open('rb')
  with requests_to(path):
    return file_system(path).open(os.fspath(path), 'rb')


def read_bytes(path: Path) -> bytes:
  """All of a file or an object, as one request."""
  if isinstance(path, pathlib.Path):
    return path.read_bytes()
  with requests_to(path):
    return file_system(path).cat_file(os.fspath(path))


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all; one that is there is replaced."""
  if isinstance(path, pathlib.Path):
    new = path.with_name(f'{path.name}.new')
    new.write_bytes(data)
    os.replace(new, path)
    return
  with requests_to(path):
    file_system(path).pipe_file(os.fspath(path), data)


def upload(file: pathlib.Path, target: Path) -> None:
  """Copies a local file into a bucket, in parts where it is large."""
  with requests_to(target):
    file_system(target).put_file(os.fspath(file), os.fspath(target))


def matching(pattern: str | os.PathLike[str]) -> list[Path]:
  """Paths that match a pattern, sorted; `**` stands for any folders."""
  path = expand(pattern)
  text = os.fspath(path)
  if isinstance(path, pathlib.Path):
    names = local_glob.glob(text, recursive=True)
    return [pathlib.Path(name) for name in sorted(names)]
  scheme = text.partition('://')[0]
  with requests_to(path):
    names = file_system(path).glob(text)
  return [epath.Path(f'{scheme}://{name}') for name in sorted(names)]


def files_below(folder: Path) -> list[Path]:
  """All files in a folder and those in it, sorted."""
  if isinstance(folder, pathlib.Path):
    return sorted(path for path in folder.rglob('*') if path.is_file())
  scheme = os.fspath(folder).partition('://')[0]
  with requests_to(folder):
    names = file_system(folder).find(os.fspath(folder))
  return [epath.Path(f'{scheme}://{name}') for name in sorted(names)]


def checksums_below(folder: Path) -> dict[str, list[Any]]:
  """Size and checksum of every object of a folder in a bucket, by its name.

  The bucket knows them: nothing is read.
  """
  with requests_to(folder):
    found = file_system(folder).find(os.fspath(folder), detail=True)
  root = os.fspath(folder).partition('://')[2] + '/'
  return {
    name.removeprefix(root): [
      info['size'],
      info.get('crc32c') or info.get('md5Hash') or info.get('ETag', ''),
    ]
    for name, info in sorted(found.items())
  }


def move_folder(folder: Path, target: Path, last: str = '') -> None:
  """Gives a folder another name.

  A bucket moves one object after the other, so whoever looks meanwhile, or
  after a kill, finds some here and some there.

  Args:
    folder: what is moved.
    target: which is not there yet.
    last: the name of the object to move after all others.
  """
  if isinstance(folder, pathlib.Path):
    folder.rename(target)
    return
  system = file_system(folder)
  names = sorted(files_below(folder), key=lambda path: path == folder / last)
  with requests_to(folder):
    for path in names:
      name = os.fspath(path).removeprefix(os.fspath(folder))
      system.copy(os.fspath(path), f'{os.fspath(target)}{name}')
      system.rm_file(os.fspath(path))


def remove_folder(folder: Path) -> None:
  """Removes a folder and all that is in it, if it is there."""
  if isinstance(folder, pathlib.Path):
    if folder.exists():
      shutil.rmtree(folder)
    return
  with requests_to(folder):
    folder.rmtree(missing_ok=True)
