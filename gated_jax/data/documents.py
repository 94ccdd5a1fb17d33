"""The stream of documents of one split for one process.

Which side of the held-out split a document falls on is decided by a hash of its
content alone, so copies of a document fall on the same side whatever file they
are in, and neither the seed nor the number of processes moves it.

Read `gated_jax/data/packing.py` next.
"""

import hashlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from gated_jax.data.sources import Document
from gated_jax.data.sources import Source


def content_hash(document: Document) -> tuple[int, int]:
  """Two independent 64-bit numbers made from what the document says."""
  if document.ids is not None:
    content = np.ascontiguousarray(document.ids, '<i4').tobytes()
  else:
    content = document.text.encode('utf-8', errors='surrogatepass')
  digest = hashlib.blake2b(content, digest_size=16).digest()
  return (
    int.from_bytes(digest[:8], 'big'),
    int.from_bytes(digest[8:], 'big'),
  )


def is_held_out(number: int, share: float) -> bool:
  """Whether the first number of `content_hash` lies in the held-out share."""
  return number < int(share * 2.0**64)


class Documents(grain.IterDataset):
  """Token arrays of the documents that `keep` says are this stream's own.

  `order` maps the place in the stream to the number of a unit; its length is
  where the stream ends. `epoch` is how many units make one pass. Documents
  with fewer ids than `least` are left out.
  """

  def __init__(
    self,
    source: Source,
    order: grain.MapDataset,
    epoch: int,
    keep: Callable[[Document], bool],
    encode: Callable[[Document], np.ndarray],
    nothing: Callable[[], str],
    least: int = 2,
  ):
    super().__init__()
    self._source = source
    self._order = order
    self._epoch = epoch
    self._keep = keep
    self._encode = encode
    self._nothing = nothing
    self._least = least

  def __iter__(self) -> grain.DatasetIterator:
    return _DocumentsIterator(
      self._source,
      self._order,
      self._epoch,
      self._keep,
      self._encode,
      self._nothing,
      self._least,
    )


class _DocumentsIterator(grain.DatasetIterator):
  """The position: which unit of the order, and the cursor inside it."""

  def __init__(self, source, order, epoch, keep, encode, nothing, least):
    super().__init__()
    self._source = source
    self._order = order
    self._epoch = epoch
    self._keep = keep
    self._encode = encode
    self._nothing = nothing
    self._least = least
    self._place = 0
    self._cursor = 0
    self._reader: Iterator[tuple[int, Document]] | None = None
    self._fruitful = False  # whether the unit gave a document
    self._fruitless = 0  # units in a row that gave none

  def __next__(self) -> np.ndarray:
    while True:
      if self._place >= len(self._order):
        if self._fruitless == self._place:
          raise ValueError(self._nothing())
        raise StopIteration
      ids = self._next_in_unit()
      if ids is not None:
        self._fruitful = True
        return ids
      self._fruitless = 0 if self._fruitful else self._fruitless + 1
      self._reader, self._fruitful = None, False
      self._place, self._cursor = self._place + 1, 0
      # Two shuffled epochs may hold their only document first and last.
      fresh = self._fruitless == self._place
      if self._fruitless >= (self._epoch if fresh else 2 * self._epoch):
        raise ValueError(self._nothing())

  def _next_in_unit(self) -> np.ndarray | None:
    """The unit's next document of ours as ids; None at its end."""
    unit = self._source.units[int(self._order[self._place])]
    if self._reader is None:
      self._reader = self._source.read(unit, self._cursor)
    while True:
      try:
        cursor, document = next(self._reader)
      except StopIteration:
        return None
      except UnicodeDecodeError as error:
        self._source.skipped.add(unit.path, f'not UTF-8 at byte {error.start}')
        return None
      except (OSError, ValueError, RuntimeError, LookupError) as error:
        self._source.skipped.add(unit.path, error)
        return None
      self._cursor = cursor
      if not self._keep(document):
        continue
      ids = self._encode(document)
      if len(ids) >= self._least:
        return ids

  def get_state(self) -> dict[str, Any]:
    return {'place': self._place, 'cursor': self._cursor}

  def set_state(self, state: dict[str, Any]) -> None:
    self._place, self._cursor = state['place'], state['cursor']
    self._reader, self._fruitful = None, state['cursor'] > 0
    self._fruitless = 0
