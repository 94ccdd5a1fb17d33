"""The record of each array of a checkpoint: its dtype, its shape and a sum.

Whoever reads arrays compares these records, so a file that was damaged without
becoming unreadable is found.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
# The dtype, the shape and the sum of each array, by its name.
Records = Mapping[str, list[Any]]


# One array at a time: a CPU writes the terms of a sum down before it adds them
# up, and those of all arrays at once would be a second model.
@jax.jit
def _sum(x: jax.Array) -> jax.Array:
  """The sum that `records` describes: each element counts by its place."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place * jnp.uint32(size) + index
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))


def array_names(tree: Tree, item: str) -> list[str]:
  """'item/path/of/array' for every array, in the order of the leaves."""

  def word(key: Any) -> str:
    """A key of a path, whichever kind of node it is of."""
    for name in ('key', 'idx', 'name'):
      if hasattr(key, name):
        return str(getattr(key, name))
    return str(key)

  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return ['/'.join([item, *(word(key) for key in path)]) for path in paths]


def records(tree: Tree, item: str) -> dict[str, list[Any]]:
  """Name of each array of a tree to its dtype, shape and sum.

  The sum is that of an array's bits, word by word, each times an odd number
  that follows from its place, modulo 2^32: one flipped bit always changes it,
  words that changed places nearly always. It is the same however an array is
  sharded, and costs one pass over what the devices hold anyway.

  Args:
    tree: arrays of any sharding; all processes call this.
    item: what the names begin with: the folder that holds the arrays.
  """
  leaves = jax.tree.leaves(tree)
  totals = [jax.device_get(_sum(x)) for x in leaves]
  return {
    name: [str(x.dtype), list(x.shape), int(total)]
    for name, x, total in zip(
      array_names(tree, item), leaves, totals, strict=True
    )
  }


def not_finite(tree: Tree, item: str) -> list[str]:
  """Names of the arrays that hold NaN or infinity."""
  finite = [jax.device_get(_finite(x)) for x in jax.tree.leaves(tree)]
  names = array_names(tree, item)
  return [name for name, good in zip(names, finite, strict=True) if not good]
