"""Files of data, on a disk or in a bucket: found, opened, and held on to.

A file on a disk is opened as ever. One in a bucket is read by ranges ahead of
its reader (`gated_jax/data/ranges.py`), and copied to the disk where a library
opens files by name alone (`gated_jax/data/copies.py`). Either way its bytes are
those that it had when it was found: a file that became another one, or went
away, ends the run with `FilesChangedError`, and is never just skipped.
"""

import concurrent.futures
import functools
import glob
import io
import os
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import TypeVar

from gated_jax.data import buckets
from gated_jax.data.buckets import Entry
from gated_jax.data.copies import Copies
from gated_jax.data.copies import SparseCopy
from gated_jax.data.ranges import RangeFile
from gated_jax.paths import expand
from gated_jax.paths import in_bucket

_THREADS = 16  # requests at once
_EXPECTED = 2  # stretches that are fetched before they are opened
_BUFFER = 256 << 10  # bytes: few calls where short lines are read

T = TypeVar('T')


class DataFiles(list[str]):
  """Names of files, with what is needed to read them.

  Args:
    names: of files on disks or in buckets.
    entries: what listings said of those in buckets.
  """

  def __init__(
    self, names: Iterable[str] = (), entries: Mapping[str, Entry] | None = None
  ):
    super().__init__(names)
    self.entries = dict(entries or {})
    self._expected: dict[tuple[str, int, int], RangeFile] = {}
    self._copies: Copies | None = None
    self._lock = threading.Lock()
    self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, 'read-ahead')
    weakref.finalize(self, self._pool.shutdown, False, cancel_futures=True)

  @staticmethod
  def of(names: Iterable[str]) -> 'DataFiles':
    """These files themselves, or such ones of plain names."""
    return names if isinstance(names, DataFiles) else DataFiles(names)

  def size(self, path: str) -> int:
    """Bytes of a file."""
    if in_bucket(path):
      return self._entry(path).size
    return os.stat(path).st_size

  def content(self, path: str) -> str:
    """A bucket's mark of a file's contents; '': it has none, or no bucket."""
    return self._entry(path).content if in_bucket(path) else ''

  def read(self, path: str, begin: int, end: int) -> bytes:
    """Some bytes, as one request where the file is in a bucket."""
    if in_bucket(path):
      return self._fetch(path, begin, end)
    with open(path, 'rb') as file:
      file.seek(begin)
      return file.read(end - begin)

  def open(self, path: str, begin: int = 0, end: int = 0) -> io.BufferedReader:
    """An open file.

    Args:
      path: of the file.
      begin: where a stretch begins that will be read to its end.
      end: of the stretch; 0: it is not known what will be read.
    """
    if not in_bucket(path):
      return open(path, 'rb')
    with self._lock:
      raw = self._expected.pop((path, begin, end), None)
    return io.BufferedReader(raw or self._ranges(path, begin, end), _BUFFER)

  def expect(self, path: str, begin: int, end: int) -> None:
    """Fetches the beginning of a stretch that will be opened soon."""
    if not in_bucket(path) or (path, begin, end) in self._expected:
      return
    raw = self._ranges(path, begin, end)
    raw.expect(begin)
    with self._lock:
      while len(self._expected) >= _EXPECTED:
        self._expected.pop(next(iter(self._expected))).close()
      self._expected[path, begin, end] = raw

  def soon(self, path: str, prepare: Callable[[], object]) -> None:
    """Prepares for a file in a bucket meanwhile; what fails does so again."""
    if in_bucket(path):
      self._pool.submit(prepare)

  def copy_of(self, path: str) -> SparseCopy | None:
    """The local stand-in of a file in a bucket; None: it is local itself."""
    if not in_bucket(path):
      return None
    fetch = functools.partial(self._fetch, path)
    with self._lock:
      self._copies = self._copies or Copies()
    return self._copies.open(path, self.size(path), fetch)

  def each(
    self, look: Callable[[str], T]
  ) -> Iterator[tuple[str, Callable[[], T]]]:
    """Every file, with what returns or raises the outcome of a look at it.

    Files in buckets are looked at many at once, since each takes a request.
    """
    waiting = [
      (
        path,
        self._pool.submit(look, path).result
        if in_bucket(path)
        else functools.partial(look, path),
      )
      for path in self
    ]
    yield from waiting

  def _ranges(self, path: str, begin: int, end: int) -> RangeFile:
    fetch = functools.partial(self._fetch, path)
    return RangeFile(fetch, self.size(path), begin, end, self._pool)

  def _entry(self, path: str) -> Entry:
    if path not in self.entries:
      self.entries[path] = buckets.entry(path)
    return self.entries[path]

  def _fetch(self, path: str, begin: int, end: int) -> bytes:
    return buckets.fetch(path, self._entry(path), begin, end)


def find_files(paths: str) -> DataFiles:
  """Files that comma-separated globs match, each once, in a fixed order.

  `**` matches folders at any depth.

  Raises:
    ValueError: a glob matches no file.
  """
  names: set[str] = set()
  entries: dict[str, Entry] = {}
  for pattern in filter(None, (part.strip() for part in paths.split(','))):
    if in_bucket(pattern):
      matches = buckets.find(pattern)
      entries |= matches
      names |= matches.keys()
    else:
      names |= _on_disk(pattern)
  if not names:
    raise ValueError(f'no data files match {paths!r}')
  return DataFiles(sorted(names), entries)


def _on_disk(pattern: str) -> set[str]:
  where = str(expand(pattern))
  names = glob.glob(where, recursive=True)
  files = {name for name in names if os.path.isfile(name)}
  if not files and os.path.isdir(where):
    raise ValueError(
      f'{pattern!r} is a folder: say which of its files, as in '
      f"'{pattern.rstrip('/')}/*'"
    )
  if not files:
    raise ValueError(f'no data files match {pattern!r}')
  return files
