"""Documents that are ids already: arrays on disk, and synthetic ones.

Read `gated_jax/data/sources.py` first.
"""

from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from jaxtyping import Int64

from gated_jax.data.array_files import BLOCK
from gated_jax.data.array_files import NONE
from gated_jax.data.array_files import ArrayFile
from gated_jax.data.array_files import Contradiction
from gated_jax.data.array_files import Wanted
from gated_jax.data.array_files import has_end
from gated_jax.data.array_files import open_array
from gated_jax.data.array_files import open_ids
from gated_jax.data.array_files import stretch
from gated_jax.data.files import DataFiles
from gated_jax.data.sources import Document
from gated_jax.data.sources import Ids
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit
from gated_jax.data.watch import IntegerFile

_RANGE = 1 << 22  # tokens of an array that are one unit
_SEARCHED = 1 << 26  # ids among which one document has to end
_DOCUMENTS = 1 << 16  # synthetic documents in one pass


class TokenSource:
  """Arrays of ids in files, see `gated_jax/data/array_files.py`.

  Documents end with the end-of-document id, which stays part of them; one
  longer than `max_document` is cut.
  """

  def __init__(
    self,
    files: Sequence[str],
    wanted: Wanted,
    max_document: int,
    skipped: Skipped,
  ):
    self.skipped = skipped
    self._max_document = max_document
    self.files = DataFiles.of(files)
    self._arrays: dict[str, ArrayFile] = {}
    self.units = []

    def look(path: str) -> ArrayFile:
      """What is known of a file."""
      return open_array(path, wanted, self.files)

    for path, result in self.files.each(look):
      try:
        array = result()
      except Contradiction:
        raise
      except Exception as error:  # a damaged header raises nearly anything
        skipped.add(path, error)
        continue
      if not array.size:
        skipped.add(path, 'empty')
      self._arrays[path] = array
      self.units += [
        Unit(path, begin, min(begin + _RANGE, array.size))
        for begin in range(0, array.size, _RANGE)
      ]
    self._refuse_without_ends()

  def _refuse_without_ends(self) -> None:
    arrays = [array for array in self._arrays.values() if array.size]
    if arrays and not has_end(arrays, self.files, _SEARCHED):
      first = arrays[0]
      searched = min(sum(array.size for array in arrays), _SEARCHED)
      raise ValueError(
        f'no document ends in {first.path} (and {len(arrays) - 1} more files): '
        f'{first.eos} is not among the first {searched:,} ids. Set data.eos to '
        f'the id that ends one, or to {NONE} where none does'
      )

  def expect(self, unit: Unit) -> None:
    """See `Source`."""
    array = self._arrays[unit.path]
    self.files.expect(unit.path, *stretch(array, unit.begin, unit.end))

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    for cursors, ids, lengths in self.blocks(unit, cursor):
      parts = np.split(ids, np.cumsum(lengths)[:-1])
      for after, part in zip(cursors, parts, strict=True):
        yield int(after), Document('', part, unit.path)

  def blocks(self, unit: Unit, cursor: int) -> Iterator[Ids]:
    """See `Source`."""
    array = self._arrays[unit.path]
    with open_ids(array, self.files, unit.begin, unit.end) as file:
      begin = cursor or _first_start(file, unit, array)
      # A document belongs to the unit where it starts, so its later pieces may
      # lie beyond the unit's end.
      while begin < unit.end or not _is_start(file, begin, array):
        ids, ends = self._next_block(file, begin, array.eos)
        if not len(ends):
          return
        # The first one is ours, or a later piece of one that is.
        starts = np.append(begin, begin + ends[:-1])
        count = max(int(np.searchsorted(starts, unit.end)), 1)
        ends = _cut(ends[:count], self._max_document)
        ids = ids[: ends[-1]]
        if ids.dtype.itemsize < 4:
          ids = ids.astype(np.int32)  # once, for all that comes
        yield Ids(begin + ends, ids, np.diff(ends, prepend=0))
        begin += int(ends[-1])

  def _next_block(
    self, file: IntegerFile, begin: int, eos: int
  ) -> tuple[Int[np.ndarray, ' T'], Int64[np.ndarray, ' N']]:
    """Ids from `begin` on, and where documents among them end.

    There is at least one end, except where the array has no more ids. A long
    document without its own is cut, and goes on at a multiple of the length.
    """
    size = BLOCK
    while True:
      ids = file[begin : begin + size]
      ends = np.flatnonzero(ids == eos) + 1
      whole = len(ids) < size
      if whole and len(ids) and (not len(ends) or ends[-1] != len(ids)):
        ends = np.append(ends, len(ids))
      if len(ends) or whole:
        return ids, ends
      if size >= self._max_document:
        return ids, np.array([size // self._max_document * self._max_document])
      size *= 4


def _cut(
  ends: Int64[np.ndarray, ' N'], longest: int
) -> Int64[np.ndarray, ' M']:
  """Ends of documents, and of the pieces that long ones are cut into."""
  lengths = np.diff(ends, prepend=0)
  if lengths.max() <= longest:
    return ends
  pieces = -(-lengths // longest)
  first = np.repeat(np.cumsum(pieces) - pieces, pieces)
  number = np.arange(len(first)) - first
  starts = np.repeat(ends - lengths, pieces)
  return np.minimum(starts + (number + 1) * longest, np.repeat(ends, pieces))


def _is_start(file: IntegerFile, place: int, array: ArrayFile) -> bool:
  """Tells whether a document starts there, or the array ends."""
  if place in (0, array.size):
    return True
  return file[place - 1] == array.eos


def _first_start(file: IntegerFile, unit: Unit, array: ArrayFile) -> int:
  """The start of the first document that starts inside the unit."""
  # One that ends just before the unit starts the unit.
  begin = max(unit.begin - 1, 0)
  if begin == unit.begin:
    return begin
  while begin < unit.end - 1:
    ids = file[begin : min(begin + BLOCK, unit.end - 1)]
    ends = np.flatnonzero(ids == array.eos)
    if len(ends):
      return begin + int(ends[0]) + 1
    begin += len(ids)
  return array.size  # none does


class SyntheticSource(Records):
  """Random tokens that repeat, which a model can learn and a table cannot.

  A document draws a span of 8 to 32 tokens uniformly and repeats it: the first
  time each costs log(vocab) nats, and after that nothing to a model that has
  learnt to copy. Every document is made from the seed and its number.
  """

  def __init__(self, vocab: int, length: int, seed: int, skipped: Skipped):
    self.skipped = skipped
    self.files = DataFiles()
    self._vocab = vocab
    self._length = length
    self._seed = seed
    self.units = [
      Unit('synthetic', begin, begin + 256)
      for begin in range(0, _DOCUMENTS, 256)
    ]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """Documents of a repeated span, made from their number alone."""
    for number in range(max(unit.begin, cursor), unit.end):
      random = np.random.default_rng((self._seed, number))
      period = int(random.integers(8, 33))
      length = int(random.integers(2 * period, 2 * period + self._length + 1))
      span = random.integers(0, self._vocab, period, np.int32)
      ids = np.resize(span, length)
      yield number + 1, Document('', ids, f'synthetic document {number}')
