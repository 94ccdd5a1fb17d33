"""Files that change under a run, or between a run and its continuation."""

import concurrent.futures
import hashlib
import os
from collections.abc import Sequence
from typing import overload

import numpy as np
from jaxtyping import Int

# A large file is compared by its head, its tail and pieces between them, and
# very many files by a number that is spread evenly over them.
_PIECE, _PIECES, _FILES = 1 << 12, 10, 1 << 10
_READERS = 16  # at once: a network answers them beside each other


class FilesChangedError(ValueError):
  """A file is not what it was when the run began to read it."""


class IntegerFile:
  """One axis of integers in a file, read where it is asked for.

  Not mapped into memory: once a file was cut short, touching its mapping ends
  the process by SIGBUS, without a word. Reading notices it.
  """

  def __init__(self, path: str, dtype: np.dtype, offset: int, length: int):
    self._path, self._offset, self._length = path, offset, length
    self.dtype = dtype
    self._file = os.open(path, os.O_RDONLY)

  def __len__(self) -> int:
    return self._length

  @overload
  def __getitem__(self, place: int) -> int: ...
  @overload
  def __getitem__(self, place: slice) -> Int[np.ndarray, ' T']: ...
  def __getitem__(self, place: int | slice) -> 'int | Int[np.ndarray, " T"]':
    if isinstance(place, int):
      return int(self._read(place, place + 1)[0])
    begin, end, _ = place.indices(self._length)
    return self._read(begin, max(begin, end))

  def _read(self, begin: int, end: int) -> Int[np.ndarray, ' T']:
    size = self.dtype.itemsize
    first, wanted = self._offset + begin * size, (end - begin) * size
    raw = os.pread(self._file, wanted, first)
    while len(raw) < wanted:
      more = os.pread(self._file, wanted - len(raw), first + len(raw))
      if not more:
        raise FilesChangedError(
          f'{self._path} was cut short while it was read: it has '
          f'{os.fstat(self._file).st_size} bytes, too few for the '
          f'{self._length} ids that it had'
        )
      raw += more
    return np.frombuffer(raw, self.dtype)

  def close(self) -> None:
    """Lets go of the file."""
    os.close(self._file)

  def __enter__(self) -> 'IntegerFile':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _sample(path: str) -> bytes:
  """A digest of pieces of a file, or of all of one that is small."""
  digest = hashlib.blake2b(digest_size=8)
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      if size <= _PIECE * _PIECES:
        digest.update(file.read())
      else:
        for number in range(_PIECES):
          place = number * (size - _PIECE) // (_PIECES - 1)
          digest.update(os.pread(file.fileno(), _PIECE, place))
  except OSError:  # no file, as for ids that are made, or an unreadable one
    return b''
  return digest.digest()


def digest_of(paths: Sequence[str]) -> str:
  """A digest of what files contain, cheap for large ones and for many.

  It samples: an edit in the middle of a large file may go unnoticed, another
  text of the same size does not.
  """
  step = -(-len(paths) // _FILES) or 1
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    samples = pool.map(_sample, paths[::step])
    return hashlib.blake2b(b''.join(samples), digest_size=8).hexdigest()
