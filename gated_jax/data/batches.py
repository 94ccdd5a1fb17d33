"""Windows to batches, and the thread that makes windows ahead.

A batch is a view of its window. Making it costs a few microseconds, which is
less than a thread takes to hand it over, so only windows are made ahead. A
position is where a window begins in every source, and how many of its rows are
used. Read `gated_jax/data/pipeline.py` next.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from gated_jax.data.finish import Arrays
from gated_jax.data.windows import Window


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
    pieces: list[Arrays] = []
    missing = self._size
    while missing and self._open_window():
      assert self._window is not None
      begin = self._used
      self._used = min(begin + missing, self._window.count)
      missing -= self._used - begin
      pieces.append(_between(self._window.arrays, begin, self._used))
    if not pieces:
      raise StopIteration
    arrays = pieces[0]
    if len(pieces) > 1:
      arrays = {
        name: np.concatenate([piece[name] for piece in pieces])
        for name in arrays
      }
    return self._source, _own(arrays, self._size, *self._share)

  def _open_window(self) -> bool:
    """Tells whether a window has rows left; opens the next one for them."""
    while self._window is None or self._used >= self._window.count:
      used = self._used if self._window is None else 0
      window = next(self._parent, None)
      if window is None:
        return False
      self._window, self._used = window, used
    return True

  def get_state(self) -> dict[str, Any]:
    """The window's beginning, and how many of its rows are used."""
    window = self._window
    if window is None or self._used >= window.count:
      used = self._used if window is None else 0
      return {'start': self._parent.get_state(), 'used': used}
    return {'start': window.start, 'used': self._used}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on with the next row of that window."""
    self._parent.set_state(state['start'])
    self._window, self._used = None, state['used']


def _between(arrays: Arrays, begin: int, end: int) -> Arrays:
  """The rows from one number to another, which are not copied."""
  return {name: array[begin:end] for name, array in arrays.items()}


def _own(arrays: Arrays, size: int, shard: int, shards: int) -> Arrays:
  """This process's rows of a global batch, the last one padded to its size."""
  count = len(arrays['tokens'])
  own = size // shards
  if count == size:
    return _between(arrays, shard * own, (shard + 1) * own)
  wanted = np.arange(shard * own, (shard + 1) * own)
  padded = {name: array[wanted % count] for name, array in arrays.items()}
  # Padding repeats rows without their weight. Where documents have no numbers
  # nothing else marks it, so what is measured inside the model is text.
  marked = padded if 'segments' in padded else ('weights',)
  for name in marked:
    padded[name][wanted >= count] = 0
  return padded


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
