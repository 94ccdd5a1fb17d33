"""Products of groups of rows with a matrix for each group, tile by tile.

    y[r] = rows[r] @ matrices[group of r]

A CPU's form. XLA writes `ragged_dot` there as a product of all rows with all
matrices, which it first copies in another order. Here a loop takes one tile of
one group's rows after another, and reads the matrices of groups that have rows
as they lie: a token that is decoded reads its own experts.

Tiles go from the front to the back. What hangs over a group's end is written
again by the tiles of the next, so that nothing has to be padded or masked.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

LEAST, MOST = 4, 128  # rows of a tile


def tile_of(rows: int, groups: int) -> int:
  """Rows of a tile: an even share of a group, rounded up to a power of two."""
  share = -(-rows // groups)
  return min(max(LEAST, 1 << (share - 1).bit_length()), MOST)


def _for_each_tile(
  sizes: Int[Array, ' E'],
  tile: int,
  body: Callable[[Array, Array, Array, Array], Array],
  start: Array,
) -> Array:
  """Runs body(group, first row, rows that are the group's, carry) in order."""
  ends = jnp.cumsum(sizes)
  tiles = -(-sizes // tile)
  tile_ends = jnp.cumsum(tiles)

  def step(number: Array, carry: Array) -> Array:
    """One tile."""
    group = (tile_ends <= number).sum()
    before = (number - (tile_ends[group] - tiles[group])) * tile
    first = ends[group] - sizes[group] + before
    return body(group, first, sizes[group] - before, carry)

  return jax.lax.fori_loop(0, tile_ends[-1], step, start)


def _product(
  rows: Float[Array, 'R D'],
  matrices: Float[Array, 'E ...'],
  sizes: Int[Array, ' E'],
  turned: bool = False,
) -> Float[Array, 'R F']:
  """Each group's rows times its matrix, or times its transpose if `turned`."""
  tile = tile_of(rows.shape[0], sizes.shape[0])
  padded = jnp.pad(rows, ((0, tile), (0, 0)))
  axis = 1 if turned else 0

  def body(group: Array, first: Array, _: Array, out: Array) -> Array:
    """Writes the product of one tile."""
    part = jax.lax.dynamic_slice_in_dim(padded, first, tile)
    matrix = jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)
    y = jax.lax.dot_general(
      part,
      matrix,
      (((1,), (axis,)), ((), ())),
      preferred_element_type=out.dtype,
    )
    return jax.lax.dynamic_update_slice_in_dim(out, y, first, 0)

  width = matrices.shape[2 - axis]
  out = jnp.zeros((padded.shape[0], width), rows.dtype)
  return _for_each_tile(sizes, tile, body, out)[: rows.shape[0]]


def _sums(
  rows: Float[Array, 'R D'],
  grad: Float[Array, 'R F'],
  sizes: Int[Array, ' E'],
) -> Float[Array, 'E D F']:
  """The gradient of the matrices: rows^T grad of each group."""
  tile = tile_of(rows.shape[0], sizes.shape[0])
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  padded = [jnp.pad(x, ((0, tile), (0, 0))) for x in (rows, grad)]

  def body(group: Array, first: Array, left: Array, out: Array) -> Array:
    """Adds what one tile gives to its group's sum."""
    inside = (jnp.arange(tile) < left)[:, None]
    x, dy = (
      jnp.where(inside, jax.lax.dynamic_slice_in_dim(part, first, tile), 0)
      for part in padded
    )
    added = jax.lax.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=dtype
    )
    old = jax.lax.dynamic_index_in_dim(out, group)
    return jax.lax.dynamic_update_slice_in_dim(out, old + added, group, 0)

  shape = (sizes.shape[0], rows.shape[1], grad.shape[1])
  return _for_each_tile(sizes, tile, body, jnp.zeros(shape, dtype))


@functools.partial(jax.custom_vjp)
def product(
  rows: Float[Array, 'R D'],
  matrices: Float[Array, 'E D F'],
  sizes: Int[Array, ' E'],
) -> Float[Array, 'R F']:
  """Each group's rows times its matrix.

  Args:
    rows: sorted by group; those past the last one come out as anything.
    matrices: one for each group.
    sizes: rows of each group.
  """
  return _product(rows, matrices, sizes)


def _backward(
  saved: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, None]:
  rows, matrices, sizes = saved
  d_rows = _product(grad, matrices, sizes, turned=True)
  return d_rows, _sums(rows, grad, sizes).astype(matrices.dtype), None


product.defvjp(lambda *inputs: (_product(*inputs), inputs), _backward)
