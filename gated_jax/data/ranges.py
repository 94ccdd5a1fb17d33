"""A file in a bucket as an open file, read by ranges ahead of its reader.

A request takes tens of milliseconds before its first byte, whatever its size.
So a stretch that will be read is fetched in pieces, several of them at once and
before they are asked for. Read `gated_jax/data/files.py` next.
"""

import collections
import concurrent.futures
import io
from collections.abc import Callable

PIECE = 4 << 20  # bytes of a request: much longer under way than answered
AHEAD = 4  # pieces of a stretch that are fetched or held at once
# Bytes of a request outside of the stretch: headers and the ends of lines.
_STRAY = 64 << 10

Fetch = Callable[[int, int], bytes]


class RangeFile(io.RawIOBase):
  """An open file whose bytes come from `fetch(begin, end)`.

  Args:
    fetch: is called in threads.
    size: bytes of the file.
    begin: where the stretch begins that is read from its beginning to its end.
    end: its end; `begin`: there is none, and every read is a request.
    pool: threads that fetch.
  """

  def __init__(
    self,
    fetch: Fetch,
    size: int,
    begin: int,
    end: int,
    pool: concurrent.futures.Executor,
  ):
    super().__init__()
    self._fetch, self._size, self._pool = fetch, size, pool
    self._begin, self._end = min(begin, size), min(end, size)
    self._place = 0
    self._pieces: collections.OrderedDict[
      int, concurrent.futures.Future[bytes]
    ] = collections.OrderedDict()
    self._stray_begin, self._stray = 0, b''

  def expect(self, place: int = 0) -> None:
    """Begins to fetch what will be read from a place of the stretch on."""
    first = max(place - self._begin, 0) // PIECE
    for number in [n for n in self._pieces if not first <= n < first + AHEAD]:
      self._pieces.pop(number).cancel()
    for number in range(first, first + AHEAD):
      begin = self._begin + number * PIECE
      end = min(begin + PIECE, self._end)
      if begin < end and number not in self._pieces:
        self._pieces[number] = self._pool.submit(self._fetch, begin, end)

  def _read(self, most: int) -> memoryview:
    """Up to so many bytes from the place on; none at the file's end."""
    place = self._place
    if self._begin <= place < self._end:
      self.expect(place)
      number, offset = divmod(place - self._begin, PIECE)
      piece = self._pieces[number].result()
      return memoryview(piece)[offset : offset + most]
    after = self._stray_begin + len(self._stray)
    if not self._stray_begin <= place < after:
      # Whoever reads on and on is given more each time.
      least = min(2 * len(self._stray), PIECE) if place == after else 0
      end = min(place + max(most, least, _STRAY), self._size)
      self._stray_begin = place
      self._stray = self._fetch(place, end) if place < end else b''
    offset = place - self._stray_begin
    return memoryview(self._stray)[offset : offset + most]

  def readinto(self, buffer) -> int:
    """See `io.RawIOBase`."""
    data = self._read(len(buffer))
    buffer[: len(data)] = data
    self._place += len(data)
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    """See `io.IOBase`."""
    origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}
    self._place = max(origin[whence] + offset, 0)
    return self._place

  def tell(self) -> int:
    """See `io.IOBase`."""
    return self._place

  def readable(self) -> bool:
    """See `io.IOBase`."""
    return True

  def seekable(self) -> bool:
    """See `io.IOBase`."""
    return True

  def close(self) -> None:
    """Drops what was fetched."""
    for piece in self._pieces.values():
      piece.cancel()
    self._pieces.clear()
    super().close()
