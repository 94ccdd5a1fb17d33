"""Documents that are ids already: arrays on disk, and synthetic ones.

Read `gated_jax/data/sources.py` first.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from jaxtyping import Int64

from gated_jax.data.sources import READ_ERRORS
from gated_jax.data.sources import Document
from gated_jax.data.sources import Ids
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit
from gated_jax.data.watch import FilesChangedError
from gated_jax.data.watch import IntegerFile

_RANGE = 1 << 22  # tokens of an array that are one unit
_BLOCK = 1 << 17  # tokens that are searched for ends at once: cache's size
_DOCUMENTS = 1 << 16  # synthetic documents in one pass


class TokenSource:
  """One-dimensional integer arrays, `*.npy` or raw `*.bin`, read in blocks.

  Documents end with the end-of-document id, which stays part of them; one
  longer than `max_document` is cut. A file `NAME.json` beside NAME may say
  `{"dtype": "uint16", "eos": 50256}`; a raw file needs it, for its dtype.
  """

  def __init__(
    self, files: list[str], eos: int, max_document: int, skipped: Skipped
  ):
    self.skipped = skipped
    self._max_document = max_document
    self._eos: dict[str, int] = {}
    self._total: dict[str, int] = {}
    self.units = []
    for path in files:
      try:
        about = _about(path)
        with _open(path) as array:
          self._total[path] = total = len(array)
        self._eos[path] = int(about.get('eos', eos))
      except Exception as error:  # a damaged header raises nearly anything
        skipped.add(path, error)
        continue
      if not total:
        skipped.add(path, 'empty')
      self.units += [
        Unit(path, begin, min(begin + _RANGE, total))
        for begin in range(0, total, _RANGE)
      ]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    for cursors, ids, lengths in self.blocks(unit, cursor):
      parts = np.split(ids, np.cumsum(lengths)[:-1])
      for after, part in zip(cursors, parts, strict=True):
        yield int(after), Document('', part, unit.path)

  def blocks(self, unit: Unit, cursor: int) -> Iterator[Ids]:
    """See `Source`."""
    eos = self._eos[unit.path]
    with self._unchanged(unit.path) as array:
      begin = cursor or _first_start(array, unit, eos)
      # A document belongs to the unit where it starts, so its later pieces
      # may lie beyond the unit's end.
      while begin < unit.end or not _starts(array, begin, eos):
        ids, ends = self._next_block(array, begin, eos)
        if not len(ends):
          return
        # The first one is ours, or a later piece of one that is.
        starts = np.append(begin, begin + ends[:-1])
        count = max(int(np.searchsorted(starts, unit.end)), 1)
        ends = _cut(ends[:count], self._max_document)
        yield Ids(begin + ends, ids[: ends[-1]], np.diff(ends, prepend=0))
        begin += int(ends[-1])

  def _unchanged(self, path: str) -> IntegerFile:
    """The array in a file; FilesChangedError where it has another length."""
    try:
      array = _open(path)
      length = len(array)
    except READ_ERRORS as error:
      raise FilesChangedError(
        f'{path} has changed since the run began to read it: {error}'
      ) from error
    if length != self._total[path]:
      array.close()
      raise FilesChangedError(
        f'{path} has changed since the run began to read it: it had '
        f'{self._total[path]} ids and has {length}'
      )
    return array

  def _next_block(
    self, array: IntegerFile, begin: int, eos: int
  ) -> tuple[Int[np.ndarray, ' T'], Int64[np.ndarray, ' N']]:
    """Ids from `begin` on, and where documents among them end.

    There is at least one end, except where the array has no more ids. A long
    document without its own is cut, and goes on at a multiple of the length.
    """
    size = _BLOCK
    while True:
      ids = array[begin : begin + size]
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


def _starts(array: IntegerFile, place: int, eos: int) -> bool:
  return place == 0 or place >= len(array) or array[place - 1] == eos


def _first_start(array: IntegerFile, unit: Unit, eos: int) -> int:
  """Where the first document that starts inside the unit starts."""
  if _starts(array, unit.begin, eos):
    return unit.begin
  for begin in range(unit.begin, unit.end, _BLOCK):
    part = array[begin : min(begin + _BLOCK, unit.end)]
    ends = np.flatnonzero(part == eos)
    if len(ends):
      return begin + int(ends[0]) + 1
  return len(array)  # none does


def _about(path: str) -> dict:
  beside = pathlib.Path(path + '.json')
  if not beside.is_file():
    return {}
  about = json.loads(beside.read_text(encoding='utf-8'))
  if not isinstance(about, dict):
    raise ValueError(f'{beside} holds no JSON object')
  return about


def _open(path: str) -> IntegerFile:
  """The array in a file, which is to be closed."""
  if os.path.getsize(path) == 0:
    raise ValueError('empty')
  if path.endswith('.npy'):
    # The mapping is made for what it knows of the file, and never touched.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  else:
    about = _about(path)
    if 'dtype' not in about:
      raise ValueError(f'a raw array needs {path}.json with its dtype')
    dtype = np.dtype(about['dtype'])
    if dtype.kind not in 'iu':
      raise ValueError(f'dtype {dtype} is not one of integers')
    if os.path.getsize(path) % dtype.itemsize:
      raise ValueError(f'truncated: no whole number of {dtype}')
    array = np.memmap(path, dtype, mode='r')
  if array.ndim != 1 or array.dtype.kind not in 'iu':
    raise ValueError(
      f'an array {array.dtype}{list(array.shape)}, not one axis of integers'
    )
  return IntegerFile(path, array.dtype, array.offset, len(array))


class SyntheticSource(Records):
  """Random tokens that repeat, which a model can learn and a table cannot.

  A document draws a span of 8 to 32 tokens uniformly and repeats it: the first
  time each costs log(vocab) nats, and after that nothing to a model that has
  learnt to copy. Every document is made from the seed and its number.
  """

  def __init__(self, vocab: int, length: int, seed: int, skipped: Skipped):
    self.skipped = skipped
    self._vocab = vocab
    self._length = length
    self._seed = seed
    self.units = [
      Unit('synthetic', begin, begin + 256)
      for begin in range(0, _DOCUMENTS, 256)
    ]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    for number in range(max(unit.begin, cursor), unit.end):
      random = np.random.default_rng((self._seed, number))
      period = int(random.integers(8, 33))
      length = int(random.integers(2 * period, 2 * period + self._length + 1))
      span = random.integers(0, self._vocab, period, np.int32)
      ids = np.resize(span, length)
      yield number + 1, Document('', ids, f'synthetic document {number}')
