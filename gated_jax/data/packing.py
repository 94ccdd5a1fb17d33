"""Documents of any length to rows of one length.

    cut      documents end to end, cut every `length` tokens; no document sees
             another, and every row but the last is full
    joined   the same, but attention crosses documents, and rows may begin with
             a fixed token
    whole    see `gated_jax/data/whole.py`

Cut rows hold every pair of a token and its successor in the same document
exactly once: the target of a chunk's last token is the first one of the next
chunk, even where that chunk lies in another row. A chunk that goes on in a new
row is a new segment there with positions from 0, since the row cannot see what
came before. In joined rows every id of the stream is a target exactly once, its
very first one only where rows have a first token.

The position is one document and an offset into it. Read
`gated_jax/data/windows.py` next.
"""

from collections.abc import Callable
from typing import NamedTuple
from typing import Protocol

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64

from gated_jax.data.documents import Chunk
from gated_jax.data.documents import DocumentStream


class Position(NamedTuple):
  """The place at which a stream of rows goes on, between two rows."""

  place: int  # the unit's place in the order
  cursor: int  # place in the unit, before the document that is open
  used: int  # tokens of that document already used


class Rows(NamedTuple):
  """Rows, of which `gated_jax/data/batches.py` makes the arrays of a batch."""

  tokens: Int32[np.ndarray, 'N T']
  targets: Int32[np.ndarray, 'N T']
  # True where a document begins, or goes on from another row; the first of a
  # row always does. None: nothing divides the row.
  begins: Bool[np.ndarray, 'N T'] | None
  filled: Int64[np.ndarray, ' N']  # places of each row that have a target
  # False where a target does not count; None: all count. Where there is no
  # target it is undefined.
  counts: Bool[np.ndarray, 'N T'] | None = None


class RowStream(Protocol):
  """Rows made from one source's documents."""

  def take(self, count: int) -> Rows:
    """The next rows; fewer where the documents end."""

  def position(self) -> Position:
    """The place after the last row that was taken."""

  def seek(self, position: Position) -> None:
    """Goes on from there."""


class Items(NamedTuple):
  """A chunk's documents as they enter rows, laid end to end."""

  values: tuple[Int32[np.ndarray, ' M'], ...]
  starts: Int64[np.ndarray, ' N']  # the beginning of each document
  counts: Bool[np.ndarray, ' M'] | None = None  # see `Rows`


def pairs(chunk: Chunk) -> Items:
  """Tokens and their successors; a document of n ids has n - 1."""
  ends = np.cumsum(chunk.lengths)
  starts = ends - chunk.lengths
  has_next, has_last = np.ones((2, len(chunk.ids)), bool)
  has_next[ends - 1] = False
  has_last[starts] = False
  values = chunk.ids[has_next], chunk.ids[has_last]
  counts = None if chunk.counts is None else chunk.counts[has_last]
  return Items(values, starts - np.arange(len(starts)), counts)


def single(chunk: Chunk) -> Items:
  """The ids themselves."""
  starts = np.cumsum(chunk.lengths) - chunk.lengths
  return Items((chunk.ids,), starts, chunk.counts)


class Taken(NamedTuple):
  """A report of `Stream.take` on the items that it wrote into arrays."""

  filled: int  # how many items there were
  borders: Int64[np.ndarray, ' N']  # items at which documents begin
  counts: Bool[np.ndarray, ' M'] | None  # see `Rows`


class Stream:
  """Items of documents end to end, of which any number can be taken."""

  def __init__(
    self, documents: DocumentStream, items: Callable[[Chunk], Items]
  ):
    self._documents = documents
    self._items = items
    self.seek(Position(0, 0, 0))

  def seek(self, position: Position) -> None:
    """Goes on from a position that `position` gave."""
    self._documents.seek(position.place, position.cursor)
    self._start = position  # counts until a document is open
    self._chunk: Chunk | None = None
    self._open = Items((np.empty(0, np.int32),), np.empty(0, np.int64))
    self._offset = 0

  def position(self) -> Position:
    """The place that the next item comes from."""
    chunk = self._chunk
    if chunk is None:
      return self._start
    if self._offset == len(self._open.values[0]):
      return Position(chunk.place, chunk.after, 0)
    starts = self._open.starts
    at = int(np.searchsorted(starts, self._offset, side='right')) - 1
    used = self._offset - int(starts[at])
    return Position(chunk.place, int(chunk.before[at]), used)

  def has_more(self) -> bool:
    """Opens the next chunk where the open one is used up."""
    while self._offset == len(self._open.values[0]):
      chunk = next(self._documents, None)
      if chunk is None:
        return False
      self._offset = self._start.used if self._chunk is None else 0
      self._chunk, self._open = chunk, self._items(chunk)
    return True

  def peek(self) -> int:
    """The first value of the next item, where there is one."""
    return int(self._open.values[0][self._offset])

  def counts(self) -> bool:
    """True if the next item, which there must be, counts as a target."""
    counts = self._open.counts
    return counts is None or bool(counts[self._offset])

  def take(self, out: tuple[Int32[np.ndarray, ' M'], ...]) -> Taken:
    """Fills arrays from their beginning on."""
    filled, borders = 0, [np.empty(0, np.int64)]
    counts: Bool[np.ndarray, ' M'] | None = None
    while filled < len(out[0]) and self.has_more():
      begin = self._offset
      size = min(len(out[0]) - filled, len(self._open.values[0]) - begin)
      for array, values in zip(out, self._open.values, strict=True):
        array[filled : filled + size] = values[begin : begin + size]
      if self._open.counts is not None:
        if counts is None:
          counts = np.ones(len(out[0]), bool)
        counts[filled : filled + size] = self._open.counts[begin : begin + size]
      starts = self._open.starts
      first, last = np.searchsorted(starts, (begin, begin + size))
      borders.append(starts[first:last] + (filled - begin))
      self._offset += size
      filled += size
    return Taken(filled, np.concatenate(borders), counts)


class CutRows:
  """Rows in which no document sees another. See `RowStream`."""

  def __init__(self, documents: DocumentStream, length: int):
    self._stream = Stream(documents, pairs)
    self._length = length

  def position(self) -> Position:
    """See `RowStream`."""
    return self._stream.position()

  def seek(self, position: Position) -> None:
    """See `RowStream`."""
    self._stream.seek(position)

  def take(self, count: int) -> Rows:
    """See `RowStream`."""
    length = self._length
    tokens, targets = np.empty((2, count * length), np.int32)
    filled, borders, counts = self._stream.take((tokens, targets))
    begins = np.zeros(len(tokens), bool)
    begins[borders] = begins[::length] = True
    rows = end_to_end(tokens, targets, begins, filled, length)
    return with_counts(rows, counts)


def end_to_end(
  tokens: Int32[np.ndarray, ' M'],
  targets: Int32[np.ndarray, ' M'],
  begins: Bool[np.ndarray, ' M'] | None,
  filled: int,
  length: int,
) -> Rows:
  """Rows from arrays of them laid end to end, of which `filled` items count."""
  count = -(-filled // length)

  def cut(array: np.ndarray) -> np.ndarray:
    """The filled rows, [rows, length]; zeros follow the last token."""
    array[filled:] = 0
    return array[: count * length].reshape(count, length)

  return Rows(
    cut(tokens),
    cut(targets),
    None if begins is None else cut(begins),
    np.clip(filled - length * np.arange(count), 0, length),
  )


def with_counts(rows: Rows, counts: Bool[np.ndarray, ' M'] | None) -> Rows:
  """The same rows, with a mark for each of their places or more."""
  if counts is None:
    return rows
  return rows._replace(
    counts=counts[: rows.tokens.size].reshape(rows.tokens.shape)
  )


class JoinedRows:
  """Rows in which attention crosses documents. See `RowStream`.

  Args:
    documents: with one id or more.
    length: of a row.
    first: the id that every row begins with; -1: none.
  """

  def __init__(self, documents: DocumentStream, length: int, first: int):
    self._stream = Stream(documents, single)
    self._length = length
    self._first = first

  def position(self) -> Position:
    """See `RowStream`."""
    return self._stream.position()

  def seek(self, position: Position) -> None:
    """See `RowStream`."""
    self._stream.seek(position)

  def take(self, count: int) -> Rows:
    """See `RowStream`."""
    length = self._length
    ids = np.empty(count * length + 1, np.int32)
    filled, _, counts = self._stream.take((ids[:-1],))
    if self._first < 0:
      # A row's last target is the id that the next row goes on with.
      if counts is not None:
        counts = np.roll(counts, -1)
      if self._stream.has_more():
        ids[filled] = self._stream.peek()
        if counts is not None:
          counts[filled - 1] = self._stream.counts()
      else:
        filled = max(filled - 1, 0)
      tokens, targets = ids[:-1].copy(), ids[1:]
    else:
      targets = ids[:-1]
      tokens = np.roll(targets, 1)
      tokens[::length] = self._first
    rows = end_to_end(tokens, targets, None, filled, length)
    return with_counts(rows, counts)
