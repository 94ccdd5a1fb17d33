"""Windows of rows to batches, and the threads that make both ahead.

A position is where a window begins in every source, and how many of its rows
are used. Read `gated_jax/data/pipeline.py` next.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental
from jaxtyping import Bool
from jaxtyping import Int32

from gated_jax.data.packing import Rows
from gated_jax.data.windows import Window
from gated_jax.data.windows import join
from gated_jax.data.windows import some

Arrays = dict[str, np.ndarray]


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
      pieces.append(some(self._window.rows, chosen))
      self._used += len(chosen)
      missing -= len(chosen)
    if not pieces:
      raise StopIteration
    rows = pieces[0] if len(pieces) == 1 else join(pieces)
    return self._source, finish(_own(rows, self._size, *self._share))

  def _open_window(self) -> bool:
    """Tells whether a window has rows left; opens the next one for them."""
    while self._window is None or self._used >= len(self._window.order):
      used = self._used if self._window is None else 0
      window = next(self._parent, None)
      if window is None:
        return False
      self._window, self._used = window, used
    return True

  def get_state(self) -> dict[str, Any]:
    """The window's beginning, and how many of its rows are used."""
    window = self._window
    if window is None or self._used >= len(window.order):
      used = self._used if window is None else 0
      return {'start': self._parent.get_state(), 'used': used}
    return {'start': window.start, 'used': self._used}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on with the next row of that window."""
    self._parent.set_state(state['start'])
    self._window, self._used = None, state['used']


def _own(rows: Rows, size: int, shard: int, shards: int) -> Rows:
  """This process's rows of a global batch, the last one padded to its size."""
  count = len(rows.filled)
  if shards == 1 and count == size:
    return rows
  own = size // shards
  wanted = np.arange(shard * own, (shard + 1) * own)
  # Padding repeats rows without their weight. Where documents have no numbers
  # nothing else marks it, so what is measured inside the model is text.
  padded = some(rows, wanted % count)
  padded.filled[wanted >= count] = 0
  if padded.begins is not None:
    for array in (padded.tokens, padded.targets, padded.begins):
      array[wanted >= count] = 0
  return padded


def finish(rows: Rows) -> Arrays:
  """The arrays of `gated_jax/data/batch.py`."""
  shape = rows.tokens.shape
  arrays = {'tokens': rows.tokens, 'targets': rows.targets}
  whole = bool((rows.filled == shape[1]).all())
  used = None if whole else np.arange(shape[1]) < rows.filled[:, None]
  if rows.begins is not None:
    segments, positions = _number(rows.begins)
    if used is not None:
      segments *= used
      positions *= used
    arrays |= {'segments': segments, 'positions': positions}
  if used is None:
    weights = np.ones(shape, np.float32)
  else:
    weights = used.astype(np.float32)
  if rows.counts is not None:
    weights *= rows.counts
  return {**arrays, 'weights': weights}


def _number(
  begins: Bool[np.ndarray, 'N T'],
) -> tuple[Int32[np.ndarray, 'N T'], Int32[np.ndarray, 'N T']]:
  """Segments of each row from 1 on, and positions in each from 0 on."""
  count, length = begins.shape
  begins[:, 0] = True  # padding may not
  starts = np.flatnonzero(begins)
  sizes = np.empty_like(starts)
  np.subtract(starts[1:], starts[:-1], out=sizes[:-1])
  sizes[-1:] = count * length - starts[-1:]
  per_row = np.count_nonzero(begins, axis=1)
  before = np.repeat(np.cumsum(per_row) - per_row, per_row)
  number = (np.arange(1, len(starts) + 1) - before).astype(np.int32)
  positions = np.arange(count * length, dtype=np.int32)
  positions -= np.repeat(starts.astype(np.int32), sizes)
  segments = np.repeat(number, sizes)
  return segments.reshape(count, length), positions.reshape(count, length)


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
    """The place of each stream."""
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
