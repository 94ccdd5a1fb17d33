"""Which rows of a global batch a process reads, and how they reach devices."""

from typing import Any
from typing import NamedTuple

import jax
import numpy as np


class HostRows(NamedTuple):
  """The rows of every batch that a process reads.

  Processes are dealt `parts` disjoint sets of rows, all of one size.
  """

  part: int
  parts: int
  rows: tuple[int, ...]  # index in the global batch of each row that it reads


def rows_of_process(
  where: jax.sharding.Sharding, batch: int, length: int, process: int = -1
) -> HostRows:
  """The rows that a process (-1: this one) has to read.

  Processes that hold the same rows (they share a tensor axis, say) read the
  same. The rows need not stand together: a pod's mesh follows its network.

  Args:
    where: sharding of a batch.
    batch: rows of the global batch.
    length: tokens of a row.
    process: index of a process.
  """
  held: dict[int, set[int]] = {}
  everywhere: Any = where.devices_indices_map((batch, length))
  for device, index in everywhere.items():
    rows = range(batch)[index[0]]
    held.setdefault(device.process_index, set()).update(rows)
  sets = sorted({tuple(sorted(rows)) for rows in held.values()})
  if any(len(rows) * len(sets) != batch for rows in sets):
    # Some rows are shared and others not: every process reads all of them.
    return HostRows(0, 1, tuple(range(batch)))
  own = held[jax.process_index() if process < 0 else process]
  part = sets.index(tuple(sorted(own)))
  return HostRows(part, len(sets), sets[part])


def to_devices(
  batch: dict[str, np.ndarray], where: jax.sharding.Sharding, own: HostRows
) -> dict[str, jax.Array]:
  """Global arrays of a batch, to which this process gives the rows it read."""
  places = {row: place for place, row in enumerate(own.rows)}

  def place(rows: np.ndarray) -> jax.Array:
    """A global array from this process's rows."""
    shape = (len(rows) * own.parts, *rows.shape[1:])

    def shard(index: Any) -> np.ndarray:
      """The rows that one device holds."""
      chosen = [places[row] for row in range(shape[0])[index[0]]]
      return rows[(chosen, *index[1:])]

    return jax.make_array_from_callback(shape, where, shard)

  return {name: place(rows) for name, rows in batch.items()}
