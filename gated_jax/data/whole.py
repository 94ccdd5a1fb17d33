"""Rows that keep documents whole, with padding where nothing fits.

Of the documents that come next, as many as fit are packed into the rows of a
window by best fit, longest first: each goes into the fullest row that still has
room for it. What is packed is always a stretch of the stream without a gap, so
a position is one document, as in `gated_jax/data/packing.py`, and the same
position gives the same rows however the documents were read. A document longer
than a row is cut into pieces of a row and a rest, each a segment of its own.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64

from gated_jax.data.documents import Chunk
from gated_jax.data.documents import DocumentStream
from gated_jax.data.packing import Position
from gated_jax.data.packing import Rows
from gated_jax.data.packing import pairs

# Documents of which one should fit into a row: by chance the first few may not.
ENOUGH = 64


class Pieces(NamedTuple):
  """Documents, or parts of long ones, end to end, and where each was read."""

  tokens: Int32[np.ndarray, ' M']
  targets: Int32[np.ndarray, ' M']
  lengths: Int64[np.ndarray, ' N']
  positions: Int64[np.ndarray, 'N 3']  # a `Position` each
  counts: Bool[np.ndarray, ' M'] | None = None  # see `Rows`

  def part(self, begin: int, end: int) -> 'Pieces':
    """Some of them, by their numbers."""
    first = int(self.lengths[:begin].sum())
    last = first + int(self.lengths[begin:end].sum())
    return Pieces(
      self.tokens[first:last],
      self.targets[first:last],
      self.lengths[begin:end],
      self.positions[begin:end],
      None if self.counts is None else self.counts[first:last],
    )


def pieces_of(chunk: Chunk, length: int, used: int) -> Pieces:
  """The documents of a chunk, cut where they are longer than a row.

  Args:
    chunk: documents of two ids or more.
    length: tokens of a row.
    used: tokens of the first document that earlier rows have; full rows.
  """
  (tokens, targets), _, counts = pairs(chunk)
  sizes = chunk.lengths - 1
  per_document = -(-sizes // length)
  document = np.repeat(np.arange(len(sizes)), per_document)
  first = np.cumsum(per_document) - per_document
  offsets = (np.arange(len(document)) - first[document]) * length
  lengths = np.minimum(sizes[document] - offsets, length)
  positions = np.stack(
    [np.full(len(document), chunk.place), chunk.before[document], offsets], 1
  )
  whole = Pieces(tokens, targets, lengths, positions, counts)
  return whole.part(used // length, len(lengths))


def concatenated(parts: Sequence[Pieces]) -> Pieces:
  """Pieces one after the other."""
  *arrays, counts = zip(*parts, strict=True)
  joined = Pieces(*(np.concatenate(array) for array in arrays))
  if all(mark is None for mark in counts):
    return joined
  marks = [
    np.ones(len(part.tokens), bool) if part.counts is None else part.counts
    for part in parts
  ]
  return joined._replace(counts=np.concatenate(marks))


def best_fit(sizes: Sequence[int], length: int) -> Int64[np.ndarray, ' N']:
  """The row of each size, longest first into the fullest row with room.

  Args:
    sizes: at least 1, at most `length`.
    length: room of a row.

  Returns:
    Rows from 0 on, as many as are needed.
  """
  rows = np.empty(len(sizes), np.int64)
  room: list[tuple[int, int]] = []  # of each row that has any, sorted
  count = 0
  for number in np.argsort(-np.asarray(sizes), kind='stable').tolist():
    size = sizes[number]
    place = bisect.bisect_left(room, (size, 0))
    if place == len(room):
      left, row = length, count
      count += 1
    else:
      left, row = room.pop(place)
    rows[number] = row
    if left > size:
      bisect.insort(room, (left - size, row))
  return rows


class WholeRows:
  """Rows in which no document is cut that fits into one. See `RowStream`.

  Args:
    documents: with two ids or more.
    length: tokens of a row.
  """

  def __init__(self, documents: DocumentStream, length: int):
    self._documents = documents
    self._length = length
    self.seek(Position(0, 0, 0))

  def seek(self, position: Position) -> None:
    """See `RowStream`."""
    self._documents.seek(position.place, position.cursor)
    self._next, self._used = position, position.used
    nothing = np.empty(0, np.int32)
    self._open = Pieces(
      nothing, nothing, np.empty(0, np.int64), np.empty((0, 3), np.int64)
    )
    # Documents since the beginning, while none of them fitted into a row.
    begins = position == Position(0, 0, 0)
    self._all_cut: int | None = 0 if begins else None

  def position(self) -> Position:
    """See `RowStream`."""
    if len(self._open.lengths):
      return Position(*self._open.positions[0].tolist())
    return self._next

  def take(self, count: int) -> Rows:
    """See `RowStream`.

    Raises:
      ValueError: the first documents are all longer than a row.
    """
    self._fill(count * self._length)
    ends = np.cumsum(self._open.lengths)
    most = int(np.searchsorted(ends, count * self._length, side='right'))
    number, rows = self._pack(most, count)
    self._check(number)
    taken = self._open.part(0, number)
    self._open = self._open.part(number, len(self._open.lengths))
    return lay_out(taken, rows, self._length)

  def _fill(self, tokens: int) -> None:
    """Reads documents until so many tokens are open."""
    parts, size = [self._open], len(self._open.tokens)
    while size < tokens:
      chunk = next(self._documents, None)
      if chunk is None:
        break
      parts.append(pieces_of(chunk, self._length, self._used))
      self._used = 0
      self._next = Position(chunk.place, chunk.after, 0)
      size += len(parts[-1].tokens)
    if len(parts) > 1:
      self._open = concatenated(parts)

  def _check(self, number: int) -> None:
    """ValueError where no document so far fitted, after enough of them."""
    if self._all_cut is None or not number:
      return
    begins = self._open.positions[:, 2] == 0
    ends = np.append(begins[1:], False) | (self._open.lengths < self._length)
    if (begins & ends)[:number].any():
      self._all_cut = None
      return
    self._all_cut += int(begins[:number].sum())
    if self._all_cut >= ENOUGH:
      raise ValueError(
        "data.rows='whole' finds only documents longer than "
        f'data.length={self._length}, and keeps none whole: use longer rows, '
        "or data.rows='cut'"
      )

  def _pack(self, most: int, count: int) -> tuple[int, Int64[np.ndarray, ' N']]:
    """As many of the next pieces as fit into the rows, and their rows."""
    sizes = self._open.lengths[:most].tolist()
    fits, number = (0, np.empty(0, np.int64)), most
    too_many = most + 1
    for _ in range(4):
      rows = best_fit(sizes[:number], self._length)
      needed = int(rows.max(initial=-1)) + 1
      if needed <= count:
        fits = number, rows
        number = (number + too_many) // 2
      else:
        too_many = number
        number = max(fits[0], min(number - 1, number * count // needed))
      if number in (fits[0], too_many):
        break
    if not fits[0] and most:  # whole rows alone always fit
      return min(count, most), np.arange(min(count, most))
    return fits


def lay_out(pieces: Pieces, rows: Int64[np.ndarray, ' N'], length: int) -> Rows:
  """The rows that the pieces were packed into, in the order of the stream."""
  count = int(rows.max(initial=-1)) + 1
  by_row = np.argsort(rows, kind='stable')
  ends = np.cumsum(pieces.lengths[by_row])
  filled = np.bincount(rows, pieces.lengths, count).astype(np.int64)
  before = np.cumsum(filled) - filled
  starts = np.empty(len(rows), np.int64)
  starts[by_row] = (
    ends - pieces.lengths[by_row] - before[rows[by_row]] + rows[by_row] * length
  )
  sources = np.cumsum(pieces.lengths) - pieces.lengths
  places = np.repeat(starts - sources, pieces.lengths)
  places += np.arange(len(pieces.tokens))
  tokens, targets = np.zeros((2, count * length), np.int32)
  begins = np.zeros(count * length, bool)
  tokens[places], targets[places] = pieces.tokens, pieces.targets
  begins[starts] = True
  # Padding follows the last document of its row and is no part of it.
  shape = (count, length)
  laid = Rows(
    tokens.reshape(shape), targets.reshape(shape), begins.reshape(shape), filled
  )
  if pieces.counts is None:
    return laid
  counts = np.zeros(count * length, bool)
  counts[places] = pieces.counts
  return laid._replace(counts=counts.reshape(shape))
