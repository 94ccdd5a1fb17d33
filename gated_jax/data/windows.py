"""Rows of several sources in a mixture, shuffled within windows.

A long document fills many rows in succession, so rows are shuffled within a
window before they become batches. A window is one array of each kind, from
which batches are cut: what costs a microsecond is paid for a window, and not
for a row or a batch.

Read `gated_jax/data/batches.py` next.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from gated_jax.data.finish import Arrays
from gated_jax.data.finish import finish
from gated_jax.data.order import permutation
from gated_jax.data.packing import Position
from gated_jax.data.packing import Rows
from gated_jax.data.packing import RowStream


class Start(NamedTuple):
  """The beginning of a window."""

  window: int  # its number
  mixed: int  # rows of all sources before it
  sources: tuple[Position, ...]


@dataclasses.dataclass(frozen=True)
class Window:
  """Rows in the order in which they are given out."""

  arrays: Arrays
  start: Start

  @property
  def count(self) -> int:
    """Rows in the window."""
    return len(self.arrays['tokens'])


@dataclasses.dataclass
class Speed:
  """How fast windows were made, while nothing else was waited for."""

  tokens: int = 0
  places: int = 0  # tokens that the rows had room for
  seconds: float = 0.0

  @property
  def tokens_per_second(self) -> float:
    """Zero before anything was measured."""
    return self.tokens / self.seconds if self.seconds else 0.0


class Windows(grain.DatasetIterator):
  """An iterator of windows.

  Args:
    streams: one for each source.
    weights: the share of rows of each; positive.
    size: rows of a window.
    seed: of the shuffle; -1: none.
  """

  def __init__(
    self,
    streams: Sequence[RowStream],
    weights: Sequence[float],
    size: int,
    seed: int,
  ):
    super().__init__()
    self._streams = streams
    self._proportions = proportions(weights)
    self._size = size
    self._seed = seed
    self._window = self._mixed = 0
    self.speed = Speed()

  def __next__(self) -> Window:
    began = time.perf_counter()
    start = self.get_state()
    sources = choose(self._mixed, self._size, self._proportions)
    counts = np.bincount(sources, minlength=len(self._streams)).tolist()
    parts = [
      stream.take(count)
      for stream, count in zip(self._streams, counts, strict=True)
    ]
    rows = parts[0] if len(parts) == 1 else _join(parts)
    del parts
    count = len(rows.filled)
    if not count:
      raise StopIteration
    places = np.arange(count)
    if len(counts) > 1:  # each row where its source was chosen
      places = np.argsort(np.argsort(sources, kind='stable'))
    if self._seed >= 0:
      places = places[permutation(count, self._seed + self._window)[::-1]]
    if len(counts) > 1 or self._seed >= 0:
      rows = _some(rows, places)
    self._window += 1
    self._mixed += count
    self.speed.tokens += int(rows.filled.sum())
    self.speed.places += rows.tokens.size
    arrays = finish(rows)
    self.speed.seconds += time.perf_counter() - began
    return Window(arrays, start)

  def get_state(self) -> Start:
    """The beginning of the next window."""
    positions = tuple(stream.position() for stream in self._streams)
    return Start(self._window, self._mixed, positions)

  def set_state(self, state: Start) -> None:
    """Goes on with the window that begins there."""
    self._window, self._mixed, positions = state
    for stream, position in zip(self._streams, positions, strict=True):
      stream.seek(position)


def proportions(weights: Sequence[float]) -> list[int]:
  """Whole numbers in about the proportions of the weights, the least 100."""
  return [int(weight * (100 / min(weights))) for weight in weights]


def choose(
  begin: int, count: int, shares: Sequence[int]
) -> Int64[np.ndarray, ' N']:
  """The source of each of `count` rows of the endless mixture.

  The first k rows have, of every source, as many as its share of k and a
  remainder below one. This is the order in which Grain mixes.
  """
  sources = np.full(count, len(shares) - 1)
  open_rows = np.ones(count, bool)
  remaining = sum(shares)
  # Products of the two grow beyond 64 bits for extreme weights.
  kind = np.int64 if (begin + count + 1) * remaining < 2**62 else object
  now = np.arange(begin, begin + count, dtype=kind)
  after = now + 1
  for source, share in enumerate(shares[:-1]):
    rest = remaining - share
    now_rest, after_rest = now * rest // remaining, after * rest // remaining
    mine = open_rows & (now - now_rest != after - after_rest)
    sources[mine] = source
    open_rows &= ~mine
    remaining, now, after = rest, now_rest, after_rest
  return sources


def _some(rows: Rows, chosen: Int64[np.ndarray, ' M']) -> Rows:
  """Rows by their numbers."""
  begins, counts = rows.begins, rows.counts
  return Rows(
    rows.tokens.take(chosen, 0),
    rows.targets.take(chosen, 0),
    None if begins is None else begins.take(chosen, 0),
    rows.filled.take(chosen),
    None if counts is None else counts.take(chosen, 0),
  )


def _join(parts: Sequence[Rows]) -> Rows:
  """Rows one after the other."""
  begins = [part.begins for part in parts if part.begins is not None]
  counts: list[np.ndarray] = []
  if any(part.counts is not None for part in parts):
    counts = [
      np.ones(part.tokens.shape, bool) if part.counts is None else part.counts
      for part in parts
    ]
  return Rows(
    np.concatenate([part.tokens for part in parts]),
    np.concatenate([part.targets for part in parts]),
    np.concatenate(begins) if begins else None,
    np.concatenate([part.filled for part in parts]),
    np.concatenate(counts) if counts else None,
  )
