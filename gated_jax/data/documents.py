"""The stream of documents of one split for one process.

Which side of the held-out split a document falls on is decided by a hash of its
content alone, so copies of a document fall on the same side whatever file they
are in, and neither the seed nor the number of processes moves it.

Documents travel in blocks, since Python spends microseconds on each thing that
it touches. Blocks of text are tokenised in threads while the next ones are
read, and come in the order in which they were read.

Read `gated_jax/data/packing.py` next.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64

from gated_jax.data.encode import Encoded
from gated_jax.data.order import Order
from gated_jax.data.sources import READ_ERRORS
from gated_jax.data.sources import Block
from gated_jax.data.sources import Ids
from gated_jax.data.sources import Source
from gated_jax.data.sources import Texts
from gated_jax.data.sources import Unit
from gated_jax.data.watch import FilesChangedError


class Chunk(NamedTuple):
  """Documents of one unit as ids, and where each of them was read."""

  ids: Int32[np.ndarray, ' T']
  lengths: Int64[np.ndarray, ' N']
  place: int  # the unit's place in the order
  before: Int64[np.ndarray, ' N']  # the cursor before each
  after: int  # the cursor after the last
  # True where an id counts as a target; None: all of them.
  counts: Bool[np.ndarray, ' T'] | None = None


class _UnitEnd(NamedTuple):
  place: int


def content_hashes(block: Block) -> Iterator[bytes]:
  """Sixteen bytes for each document, made from what it says."""
  blake2b = functools.partial(hashlib.blake2b, digest_size=16)
  if isinstance(block, Texts):
    for text in block.texts:
      yield blake2b(text.encode('utf-8', 'surrogatepass')).digest()
    return
  content = memoryview(np.ascontiguousarray(block.ids, '<i4')).cast('B')
  begin = 0
  for end in (4 * np.cumsum(block.lengths)).tolist():
    yield blake2b(content[begin:end]).digest()
    begin = end


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which documents belong to a split, and to a process of several."""

  held_out: float  # the share that is held out
  validation: bool  # True: held-out documents are wanted, and no others
  shard: int = 0
  shards: int = 1  # processes that documents are dealt to; 1: all are ours

  def of(self, block: Block) -> Bool[np.ndarray, ' N'] | None:
    """Marks the documents that are wanted; None: all of them."""
    if not self.held_out and not self.validation and self.shards == 1:
      return None
    numbers = np.frombuffer(b''.join(content_hashes(block)), '>u8')
    side, dealt = numbers.reshape(-1, 2).T
    wanted = side < np.uint64(int(self.held_out * 2.0**64))
    if not self.validation:
      wanted = ~wanted
    if self.shards > 1:
      wanted &= dealt % np.uint64(self.shards) == self.shard
    return wanted


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the documents of a source become ids.

  Attributes:
    select: which documents are this stream's own.
    encode: texts, and where each was read, to ids.
    vocab: ids of arrays must lie below it.
    least: a document with fewer ids is left out.
    nothing: the error's text where a whole pass has no document.
    pool: threads that encode, or None.
    ahead: blocks that are given to them before the first is taken.
  """

  select: Selection
  encode: Callable[[Sequence[str], Sequence[str]], Encoded]
  vocab: int
  least: int
  nothing: Callable[[], str]
  pool: concurrent.futures.Executor | None = None
  ahead: int = 0


class DocumentStream:
  """Chunks of documents, from any place on that one was read at."""

  def __init__(self, source: Source, order: Order, reading: Reading):
    self._source = source
    self._order = order
    self._reading = reading
    self.seek(0, 0)

  def seek(self, place: int, cursor: int) -> None:
    """Goes on with what lies behind the cursor of the unit at `place`."""
    self._reader = self._read(place, cursor)
    self._waiting: collections.deque[Any] = collections.deque()
    self._read_all = False
    self._place = place
    self._fruitful = cursor > 0  # True once the unit has given a document
    self._fruitless = 0  # units in a row that gave none

  def __iter__(self) -> Iterator[Chunk]:
    return self

  def __next__(self) -> Chunk:
    while True:
      item = self._next_item()
      if item is None:
        if self._fruitless == self._place:
          raise ValueError(self._reading.nothing())
        raise StopIteration
      if isinstance(item, _UnitEnd):
        self._end_unit(item.place)
      elif len(item.lengths):
        self._fruitful = True
        return item

  def _next_item(self) -> Chunk | _UnitEnd | None:
    """The next block that was read; None at the end of the order."""
    while not self._read_all and len(self._waiting) <= self._reading.ahead:
      item = next(self._reader, None)
      if item is None:
        self._read_all = True
      else:
        self._waiting.append(item)
    if not self._waiting:
      return None
    item = self._waiting.popleft()
    return item() if callable(item) else item

  def _end_unit(self, place: int) -> None:
    self._fruitless = 0 if self._fruitful else self._fruitless + 1
    self._fruitful = False
    self._place = place + 1
    # Two shuffled epochs may hold their only document first and last.
    fresh = self._fruitless == self._place
    epoch = self._order.epoch
    if self._fruitless >= (epoch if fresh else 2 * epoch):
      raise ValueError(self._reading.nothing())

  def _read(
    self, place: int, cursor: int
  ) -> Iterator[Callable[[], Chunk] | _UnitEnd]:
    """Yields what becomes a chunk when it is called, and ends of units."""
    order = self._order
    while not order.places or place < order.places:
      unit = self._source.units[order.unit(place)]
      if not order.places or place + 1 < order.places:
        self._source.expect(self._source.units[order.unit(place + 1)])
      for block in self._blocks(unit, cursor):
        yield self._begin(block, place, cursor, unit.path)
        cursor = int(block.cursors[-1])
      yield _UnitEnd(place)
      place, cursor = place + 1, 0

  def _blocks(self, unit: Unit, cursor: int) -> Iterator[Block]:
    """Yields a unit's blocks up to where it cannot be read."""
    try:
      yield from self._source.blocks(unit, cursor)
    except FilesChangedError:
      raise
    except UnicodeDecodeError as error:
      self._source.skipped.add(unit.path, f'not UTF-8 at byte {error.start}')
    except READ_ERRORS as error:
      self._source.skipped.add(unit.path, error)

  def _begin(
    self, block: Block, place: int, cursor: int, origin: str
  ) -> Callable[[], Chunk]:
    """Chooses documents of a block, and begins to encode them."""
    reading = self._reading
    wanted = reading.select.of(block)
    before, after = _before(block, cursor), int(block.cursors[-1])
    if isinstance(block, Ids):
      if wanted is None:
        wanted = np.ones(len(block.lengths), bool)
      wanted &= block.lengths >= reading.least

      def finish() -> Chunk:
        """The block's wanted documents, with ids already at hand."""
        encoded = _checked(block, wanted, reading.vocab, origin)
        return Chunk(encoded.ids, encoded.lengths, place, before[wanted], after)

      return finish

    texts, origins = block.texts, block.origins
    if wanted is not None:
      texts = list(itertools.compress(texts, wanted))
      origins = list(itertools.compress(origins, wanted))
      before = before[wanted]
    future = reading.pool and reading.pool.submit(
      reading.encode, texts, origins
    )

    def finish_encoding() -> Chunk:
      """Waits for the encoder; short documents are left out."""
      ids, lengths, counts = (
        future.result() if future else reading.encode(texts, origins)
      )
      long = lengths >= reading.least
      if not long.all():
        of_long = np.repeat(long, lengths)
        ids = ids[of_long]
        counts = None if counts is None else counts[of_long]
      return Chunk(ids, lengths[long], place, before[long], after, counts)

    return finish_encoding


def _before(block: Block, cursor: int) -> Int64[np.ndarray, ' N']:
  """The cursor before each document of a block that was read from `cursor`."""
  before = np.empty(len(block.cursors), np.int64)
  before[0] = cursor
  before[1:] = block.cursors[:-1]
  return before


def _checked(
  block: Ids, wanted: Bool[np.ndarray, ' N'], vocab: int, origin: str
) -> Encoded:
  """The ids of the documents that are wanted, all of them in the vocabulary."""
  ids, lengths = block.ids, block.lengths
  if not wanted.all():
    ids, lengths = ids[np.repeat(wanted, lengths)], lengths[wanted]
  if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
    bad = ids[(ids < 0) | (ids >= vocab)][0]
    raise ValueError(
      f'token id {bad} in {origin} lies outside the vocabulary of {vocab}'
    )
  return Encoded(ids.astype(np.int32, copy=False), lengths)
