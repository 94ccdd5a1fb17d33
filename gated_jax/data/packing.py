"""Documents of any length to rows of one length, without padding.

Documents are laid end to end and cut every `length` tokens. First-fit packing
would keep short documents whole, but pads rows and must hold open many of them,
which all have to be rebuilt when a run resumes; here the position is one
document and an offset into it, and every row but the last is full.

Every pair of a token and its successor in the same document appears exactly
once: the target of a chunk's last token is the first one of the next chunk,
even where that chunk lies in another row. A chunk that goes on in a new row is
a new segment there with positions from 0, since the row cannot see what came
before. Read `gated_jax/data/pipeline.py` next.
"""

from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from gated_jax.data.batch import SCHEMA
from gated_jax.data.batch import arrays_of

Row = dict[str, np.ndarray]


class PackedRows(grain.IterDataset):
  """Rows of `length` from a dataset of documents (arrays of two ids or more).

  `gated_jax/data/batch.py` says what a row holds.
  """

  def __init__(self, parent: grain.IterDataset, length: int):
    super().__init__(parent)
    self._length = length

  def __iter__(self) -> grain.DatasetIterator:
    return _PackedRowsIterator(self._parent.__iter__(), self._length)


class _PackedRowsIterator(grain.DatasetIterator):
  """The position: where the open document was read, and how far it is used."""

  def __init__(self, parent: grain.DatasetIterator, length: int):
    super().__init__(parent)
    self._length = length
    self._open = np.empty(0, np.int32)
    self._used = 0
    self._before = self._parent.get_state()

  def __next__(self) -> Row:
    chunks: list[np.ndarray] = []
    room = self._length
    while room:
      left = len(self._open) - 1 - self._used
      if left <= 0:
        before = self._parent.get_state()
        try:
          self._open = next(self._parent)
        except StopIteration:
          if not chunks:
            raise
          # The position after the last row is the end of the documents.
          self._open = np.empty(0, np.int32)
          self._before, self._used = before, 0
          break
        self._before, self._used = before, 0
        continue
      take = min(room, left)
      chunks.append(self._open[self._used : self._used + take + 1])
      self._used += take
      room -= take
    return pack_row(chunks, self._length)

  def get_state(self) -> dict[str, Any]:
    if self._used >= len(self._open) - 1:
      return {'parent': self._parent.get_state(), 'used': 0}
    return {'parent': self._before, 'used': self._used}

  def set_state(self, state: dict[str, Any]) -> None:
    self._parent.set_state(state['parent'])
    self._before = self._parent.get_state()
    self._used = state['used']
    self._open = next(self._parent) if self._used else np.empty(0, np.int32)


class JoinedRows(grain.IterDataset):
  """Rows of `length` from documents laid end to end, with no border kept.

  A row is `tokens`, `targets` and `weights`: a model without document numbers
  attends to all that came before in the row. Every id of the stream is a
  target exactly once, its very first one only where rows have a first token.

  Args:
    parent: documents, arrays of one id or more.
    length: ids per row.
    first: the id that every row begins with; -1: none.
  """

  def __init__(self, parent: grain.IterDataset, length: int, first: int):
    super().__init__(parent)
    self._length = length
    self._first = first

  def __iter__(self) -> grain.DatasetIterator:
    return _JoinedRowsIterator(
      self._parent.__iter__(), self._length, self._first
    )


class _JoinedRowsIterator(grain.DatasetIterator):
  """The position: where the open document was read, and how far it is used.

  The open document is never used up unless the stream has ended, since a
  row's last target is the id with which the next row goes on.
  """

  def __init__(self, parent: grain.DatasetIterator, length: int, first: int):
    super().__init__(parent)
    self._length = length
    self._first = first
    self._open = np.empty(0, np.int32)
    self._used = 0
    self._before = self._parent.get_state()

  def __next__(self) -> Row:
    chunks: list[np.ndarray] = []
    room = self._length
    while room and self._has_ids():
      take = min(room, len(self._open) - self._used)
      chunks.append(self._open[self._used : self._used + take])
      self._used += take
      room -= take
    if self._first >= 0 and chunks:
      chunks.insert(0, np.array([self._first], np.int32))
    elif self._has_ids():
      chunks.append(self._open[self._used : self._used + 1])
    ids = np.concatenate([*chunks, np.empty(0, np.int32)])
    if len(ids) < 2:
      raise StopIteration
    return _joined_row(ids, self._length)

  def _has_ids(self) -> bool:
    """Opens the next document where the open one is used up."""
    while self._used == len(self._open):
      before = self._parent.get_state()
      try:
        self._open = next(self._parent)
      except StopIteration:
        return False
      self._before, self._used = before, 0
    return True

  def get_state(self) -> dict[str, Any]:
    if self._used == len(self._open):
      return {'parent': self._parent.get_state(), 'used': 0}
    return {'parent': self._before, 'used': self._used}

  def set_state(self, state: dict[str, Any]) -> None:
    self._parent.set_state(state['parent'])
    self._before = self._parent.get_state()
    self._used = state['used']
    self._open = next(self._parent) if self._used else np.empty(0, np.int32)


def _joined_row(ids: Int32[np.ndarray, ' _'], length: int) -> Row:
  row = {
    name: np.zeros(length, dtype) for name, dtype in arrays_of('joined').items()
  }
  row['tokens'][: len(ids) - 1] = ids[:-1]
  row['targets'][: len(ids) - 1] = ids[1:]
  row['weights'][: len(ids) - 1] = 1
  return row


def pack_row(chunks: list[Int32[np.ndarray, ' _']], length: int) -> Row:
  """One row from chunks, each one token longer than the room it takes."""
  row = {name: np.zeros(length, dtype) for name, dtype in SCHEMA.items()}
  begin = 0
  for number, chunk in enumerate(chunks, 1):
    end = begin + len(chunk) - 1
    row['tokens'][begin:end] = chunk[:-1]
    row['targets'][begin:end] = chunk[1:]
    row['segments'][begin:end] = number
    row['positions'][begin:end] = np.arange(end - begin)
    begin = end
  row['weights'][:begin] = 1
  return row
