"""Rows to the arrays of `gated_jax/data/batch.py`.

Read `gated_jax/data/windows.py` next, which makes all rows of a window at once.
"""

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32

from gated_jax.data.packing import Rows

Arrays = dict[str, np.ndarray]


def finish(rows: Rows) -> Arrays:
  """Numbers the documents of rows, and weighs their targets."""
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
