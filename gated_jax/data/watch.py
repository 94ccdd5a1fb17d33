"""Files that change under a run, or between a run and its continuation."""

import concurrent.futures
import hashlib
import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import BinaryIO
from typing import overload

import numpy as np
from jaxtyping import Int

from gated_jax import cli

# A large file is compared by its head, its tail and pieces between them, and
# very many files by a number that is spread evenly over them.
_PIECE, _PIECES, _FILES = 1 << 12, 10, 1 << 10
_READERS = 16  # at once: a network answers them beside each other


class FilesChangedError(ValueError):
  """A file is not what it was when the run began to read it."""


class FilesOutOfReachError(FilesChangedError, cli.TryLater):
  """A bucket did not answer, or refused, however often it was asked."""


class IntegerFile:
  """One axis of integers in a file, read where it is asked for.

  Not mapped into memory: once a file was cut short, touching its mapping ends
  the process by SIGBUS, without a word. Reading notices it.

  Args:
    path: of the file.
    dtype: of the integers.
    offset: bytes before the first.
    length: how many there are.
    file: the file where it is open already.
  """

  def __init__(
    self,
    path: str,
    dtype: np.dtype,
    offset: int,
    length: int,
    file: BinaryIO | None = None,
  ):
    self._path, self._offset, self._length = path, offset, length
    self.dtype = dtype
    self._file = file or open(path, 'rb', buffering=0)  # noqa: SIM115

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
    self._file.seek(first)
    raw = self._file.read(wanted)
    while len(raw) < wanted:
      more = self._file.read(wanted - len(raw))
      if not more:
        raise FilesChangedError(
          f'{self._path} was cut short while it was read: it has '
          f'{self._file.seek(0, os.SEEK_END)} bytes, too few for the '
          f'{self._length} ids that it had'
        )
      raw += more
    return np.frombuffer(raw, self.dtype)

  def close(self) -> None:
    """Lets go of the file."""
    self._file.close()

  def __enter__(self) -> 'IntegerFile':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def sample(size: int, read: Callable[[int, int], bytes]) -> bytes:
  """A digest of pieces of a file, or of all of one that is small.

  Args:
    size: bytes of the file.
    read: its bytes from one place to another.
  """
  digest = hashlib.blake2b(digest_size=8)
  if size <= _PIECE * _PIECES:
    digest.update(read(0, size))
  else:
    for number in range(_PIECES):
      place = number * (size - _PIECE) // (_PIECES - 1)
      digest.update(read(place, place + _PIECE))
  return digest.digest()


def sample_of_file(path: str) -> bytes:
  """The sample of a file on a disk; empty where there is none to read."""
  try:
    with open(path, 'rb') as file:
      number = file.fileno()
      size = os.fstat(number).st_size
      return sample(size, lambda a, b: os.pread(number, b - a, a))
  except OSError:  # no file, as for ids that are made, or an unreadable one
    return b''


def digest_of(
  paths: Sequence[str], sample_of: Callable[[str], bytes] = sample_of_file
) -> str:
  """A digest of what files contain, cheap for large ones and for many.

  It samples: an edit in the middle of a large file may go unnoticed, another
  text of the same size does not.

  Args:
    paths: of the files.
    sample_of: what stands for the contents of one.
  """
  step = -(-len(paths) // _FILES) or 1
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    samples = pool.map(sample_of, paths[::step])
    return hashlib.blake2b(b''.join(samples), digest_size=8).hexdigest()
