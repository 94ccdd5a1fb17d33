"""Rows of several sources, shuffled within windows, to batches.

A long document fills many rows in succession, so rows are shuffled within a
window before they become batches. A window is one array of each kind: what
costs a microsecond is paid for a window or a batch, and not for a row.

A position is where a window begins in every source, and how many of its rows
are used. Read `gated_jax/data/pipeline.py` next.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import grain
import numpy as np
from grain import experimental
from jaxtyping import Int64

from gated_jax.data.order import permutation
from gated_jax.data.packing import Arrays
from gated_jax.data.packing import Position
from gated_jax.data.packing import Rows
from gated_jax.data.packing import RowStream


class Start(NamedTuple):
  """Where a window begins."""

  window: int  # its number
  mixed: int  # rows of all sources before it
  sources: tuple[Position, ...]


@dataclasses.dataclass(frozen=True)
class Window:
  """Rows, and the order in which they are given out."""

  rows: Rows
  order: Int64[np.ndarray, ' N']
  start: Start


@dataclasses.dataclass
class Speed:
  """How fast windows were made, while nothing else was waited for."""

  tokens: int = 0
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
    rows = parts[0] if len(parts) == 1 else _interleave(parts, sources)
    count = len(rows.filled)
    if not count:
      raise StopIteration
    if self._seed < 0:
      order = np.arange(count)
    else:
      order = permutation(count, self._seed + self._window)[::-1]
    self._window += 1
    self._mixed += count
    self.speed.tokens += int(rows.filled.sum())
    self.speed.seconds += time.perf_counter() - began
    return Window(rows, order, start)

  def get_state(self) -> Start:
    """Where the next window begins."""
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


def _interleave(
  parts: Sequence[Rows], sources: Int64[np.ndarray, ' N']
) -> Rows:
  """Rows of all sources, each where its source was chosen."""
  order = np.argsort(np.argsort(sources, kind='stable'))

  def join(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(values)[order]

  names = parts[0].arrays
  return Rows(
    {name: join([part.arrays[name] for part in parts]) for name in names},
    join([part.filled for part in parts]),
  )


class Batches(grain.DatasetIterator):
  """An iterator of batches, cut from windows one after the other.

  Args:
    windows: gives windows, most likely by a thread.
    size: rows of a batch, over all processes where they share one.
    share: which part of each batch is this process's, of how many.
    source: the number of the source that all rows are of.
  """

  def __init__(
    self,
    windows: grain.DatasetIterator,
    size: int,
    share: tuple[int, int] = (0, 1),
    source: int = 0,
  ):
    super().__init__(windows)
    self._size = size
    self._share = share
    self._source = source
    self._window: Window | None = None
    self._used = 0  # rows of the window, or of the one that comes first

  def __next__(self) -> tuple[int, Arrays]:
    pieces: list[Rows] = []
    missing = self._size
    while missing and self._open_window():
      assert self._window is not None
      chosen = self._window.order[self._used : self._used + missing]
      pieces.append(_some(self._window.rows, chosen))
      self._used += len(chosen)
      missing -= len(chosen)
    if not pieces:
      raise StopIteration
    rows = pieces[0] if len(pieces) == 1 else _join(pieces)
    return self._source, _batch(_own(rows, self._size, *self._share))

  def _open_window(self) -> bool:
    """Whether there is a window with rows left; opens the next for them."""
    while self._window is None or self._used >= len(self._window.order):
      used = self._used if self._window is None else 0
      window = next(self._parent, None)
      if window is None:
        return False
      self._window, self._used = window, used
    return True

  def get_state(self) -> dict[str, Any]:
    """Where the window begins, and how many of its rows are used."""
    window = self._window
    if window is None or self._used >= len(window.order):
      used = self._used if window is None else 0
      return {'start': self._parent.get_state(), 'used': used}
    return {'start': window.start, 'used': self._used}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on with the next row of that window."""
    self._parent.set_state(state['start'])
    self._window, self._used = None, state['used']


def _some(rows: Rows, chosen: Int64[np.ndarray, ' M']) -> Rows:
  arrays = {name: value[chosen] for name, value in rows.arrays.items()}
  return Rows(arrays, rows.filled[chosen])


def _join(pieces: Sequence[Rows]) -> Rows:
  names = pieces[0].arrays
  return Rows(
    {n: np.concatenate([p.arrays[n] for p in pieces]) for n in names},
    np.concatenate([p.filled for p in pieces]),
  )


def _own(rows: Rows, size: int, shard: int, shards: int) -> Rows:
  """This process's rows of a global batch, the last one padded to its size."""
  count = len(rows.filled)
  if shards == 1 and count == size:
    return rows
  own = size // shards
  wanted = np.arange(shard * own, (shard + 1) * own)
  # Padding repeats rows without their weight. Where documents have no numbers
  # nothing else marks it, so what is measured inside the model is text.
  padded = _some(rows, wanted % count)
  absent = wanted >= count
  padded.filled[absent] = 0
  if 'segments' in padded.arrays:
    for value in padded.arrays.values():
      value[absent] = 0
  return padded


def _batch(rows: Rows) -> Arrays:
  """The arrays of `gated_jax/data/batch.py`."""
  shape = rows.arrays['tokens'].shape
  if (rows.filled == shape[1]).all():
    weights = np.ones(shape, np.float32)
  else:
    places = np.arange(shape[1]) < rows.filled[:, None]
    weights = places.astype(np.float32)
  return {**rows.arrays, 'weights': weights}


class InTurn(grain.DatasetIterator):
  """Batches of several finite streams, in proportion, until all have ended.

  Every stream has its first batch before any has its second, so that a few
  batches show something of each.
  """

  def __init__(
    self, streams: Sequence[grain.DatasetIterator], weights: Sequence[float]
  ):
    super().__init__(streams)
    self._weights = weights
    self._given = [0] * len(streams)
    self._ended = [False] * len(streams)

  def __next__(self) -> tuple[int, Arrays]:
    while not all(self._ended):
      due = min(
        (given > 0, given / weight, i)
        for i, (given, weight) in enumerate(
          zip(self._given, self._weights, strict=True)
        )
        if not self._ended[i]
      )[-1]
      batch = next(self._parents[due], None)
      if batch is not None:
        self._given[due] += 1
        return batch
      self._ended[due] = True
    raise StopIteration

  def get_state(self) -> dict[str, Any]:
    """Where each stream is."""
    return {
      'given': list(self._given),
      'ended': list(self._ended),
      'streams': [stream.get_state() for stream in self._parents],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from there."""
    self._given, self._ended = list(state['given']), list(state['ended'])
    for stream, place in zip(self._parents, state['streams'], strict=True):
      stream.set_state(place)


class Ahead(experimental.ThreadPrefetchDatasetIterator):
  """Grain's reading ahead by a thread, whose iterator may be closed twice."""

  # It is closed again when it is collected, which at the interpreter's end is
  # after the modules that closing needs.
  def close(self) -> None:
    """Stops the thread."""
    if not self._closed:
      super().close()
