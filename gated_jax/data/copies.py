"""Local files that stand for files in buckets, filled where they are read.

Some libraries open files by name alone. They are given a file of the same size,
which is a hole at first and takes no room, and holds the bytes of every stretch
that was asked for.
"""

import os
import pathlib
import tempfile
import threading

from gated_jax.data.ranges import PIECE
from gated_jax.data.ranges import Fetch

# Bytes that are filled together. A multiple of 64 KiB: where ArrayRecord's
# blocks begin, so that no hole lies inside a block and is taken for its data.
GRAIN = 256 << 10
_ROOM = 1 << 30  # bytes of disk that the copies of a source take at most


class SparseCopy:
  """One file; see above.

  Args:
    path: where it is to be.
    size: bytes of the file in the bucket.
    fetch: its bytes from one place to another.
  """

  def __init__(self, path: pathlib.Path, size: int, fetch: Fetch):
    self.path, self.size = path, size
    self._fetch = fetch
    self._lock = threading.Lock()
    self.empty()

  def empty(self) -> None:
    """Gives the room back."""
    with self._lock:
      self.filled = 0
      self._is_filled = bytearray(-(-self.size // GRAIN))
      with self.path.open('wb') as file:
        file.truncate(self.size)

  def is_hole(self, place: int) -> bool:
    """Tells whether the byte at a place has not been fetched."""
    return 0 <= place < self.size and not self._is_filled[place // GRAIN]

  def fill(self, begin: int, end: int) -> None:
    """Fetches what lies between two places and is not there."""
    first = max(begin, 0) // GRAIN
    last = -(-min(end, self.size) // GRAIN)
    with self._lock, self.path.open('r+b') as file:
      while first < last:
        after = first
        while (
          after < last
          and not self._is_filled[after]
          and (after - first) * GRAIN < PIECE
        ):
          after += 1
        if after > first:
          place = first * GRAIN
          data = self._fetch(place, min(after * GRAIN, self.size))
          os.pwrite(file.fileno(), data, place)
          self._is_filled[first:after] = b'\1' * (after - first)
          self.filled += len(data)
        first = max(after, first + 1)


class Copies:
  """The copies of a source's files, which take a bounded room together."""

  def __init__(self, room: int = _ROOM) -> None:
    # Removed with this object, or when the process ends in its own way.
    self._folder = tempfile.TemporaryDirectory(
      prefix='gated-jax-', ignore_cleanup_errors=True
    )
    self._room = room
    self._copies: dict[str, SparseCopy] = {}  # the one used last at the end
    self._lock = threading.Lock()

  def open(self, path: str, size: int, fetch: Fetch) -> SparseCopy:
    """The copy of a file; others are emptied where the room is used up."""
    with self._lock:
      copy = self._copies.pop(path, None)
      if copy is None:
        name = pathlib.Path(self._folder.name, str(len(self._copies)))
        copy = SparseCopy(name, size, fetch)
      self._copies[path] = copy
      used = sum(each.filled for each in self._copies.values())
      for each in list(self._copies.values())[:-1]:
        if used <= self._room:
          break
        used -= each.filled
        each.empty()
      return copy
