"""Products of matrices inside the kernels, and the inverse by products.

The inverse is formed as `gated_jax/ops/delta/inverse.py` explains. Blocks of a
few rows are substituted on the vector units, side by side in a few registers;
larger ones are joined by products, of which only the lower rows of each pair of
blocks go through the matrix unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

CHUNK = 128  # tokens
SUBLANES = 8
# Rows of the blocks that are substituted.
BLOCK = 16


class Products:
  """Products of matrices, as precise as the arrays that go in."""

  def __init__(self, dtype: jnp.dtype):
    self.dtype = dtype

  def __call__(
    self, a: Array, b: Array, of: tuple[int, int] = (1, 0)
  ) -> Float[Array, 'M N']:
    """Summed over axis `of[0]` of a and `of[1]` of b, in float32."""
    return self._dot(a.astype(self.dtype), b.astype(self.dtype), of)

  def _dot(self, a: Array, b: Array, of: tuple[int, int]) -> Array:
    wide = a.dtype == jnp.float32
    return jax.lax.dot_general(
      a,
      b,
      (((of[0],), (of[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if wide else None,
      preferred_element_type=jnp.float32,
    )


def inverses_of(
  couplings: list[Float[Array, 'C C']], product: Products
) -> list[Float[Array, 'C C']]:
  """(I + strictly lower part of each)^-1, as `inverse.py` explains."""
  inverses = _substitute(couplings)
  size = BLOCK
  while size < CHUNK:
    inverses = _join(inverses, couplings, Pairs(size, product))
    size *= 2
  return inverses


def _substitute(
  couplings: list[Float[Array, 'C C']],
) -> list[Float[Array, 'C C']]:
  """(I + strictly lower part of each diagonal block)^-1, zero elsewhere.

  The blocks of a matrix are laid side by side, so that they fill all lanes of
  a few registers. Each row in turn is then taken off the later ones of its own
  block, by the entries of a column that are spread over the block's lanes.
  """
  shape = (SUBLANES, CHUNK)
  row, lane = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1)
  )
  block, place = lane // BLOCK, lane % BLOCK
  tiles = range(0, BLOCK, SUBLANES)

  def side_by_side(coupling: Array) -> list[Array]:
    """Tiles of all diagonal blocks, strictly lower part."""
    compact = []
    for top in tiles:
      tile = jnp.zeros(shape, jnp.float32)
      for b in range(CHUNK // BLOCK):
        at = b * BLOCK + top
        tile = jnp.where(block == b, coupling[at : at + SUBLANES], tile)
      compact.append(jnp.where(row + top > place, tile, 0))
    return compact

  compact = [side_by_side(coupling) for coupling in couplings]
  inverses = [
    [jnp.where(row + top == place, 1.0, 0.0) for top in tiles] for _ in compact
  ]
  for j in range(BLOCK - 1):
    spread = block * BLOCK + j
    for y, x in zip(compact, inverses, strict=True):
      at = j % SUBLANES
      taken = x[j // SUBLANES][at : at + 1]
      for tile in range((j + 1) // SUBLANES, len(tiles)):
        weights = jnp.take_along_axis(
          y[tile], spread, axis=1, mode='promise_in_bounds'
        )
        x[tile] -= weights * taken
  return [
    jnp.concatenate(
      [
        jnp.where(block == b, tile, 0)
        for b in range(CHUNK // BLOCK)
        for tile in x
      ],
      axis=0,
    )
    for x in inverses
  ]


class Pairs(NamedTuple):
  """Pairs of neighbouring blocks on the diagonal, and products of their parts.

  Such parts have one block of rows for each pair, [C / 2, C]. Their entries lie
  in the lanes of the pair's upper or lower block. The lanes of the other block
  are free, and take what rounding a left factor to bfloat16 leaves: its product
  is as precise as one of float32 by two passes of the matrix unit.
  """

  size: int
  product: Products

  def rows(self, x: Float[Array, 'C C'], lower: bool) -> Float[Array, 'D C']:
    """The rows of all upper or of all lower blocks."""
    tops = range(self.size * lower, CHUNK, 2 * self.size)
    return jnp.concatenate([x[i : i + self.size] for i in tops], axis=0)

  def in_upper_lanes(self, x: Float[Array, 'D C']) -> Float[Array, 'D C']:
    """x in the lanes of its own pair's upper block, zero elsewhere."""
    row, lane = (
      jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1)
    )
    upper = lane // self.size == 2 * (row // self.size)
    return jnp.where(upper, x, 0)

  def multiply(
    self,
    xs: list[Float[Array, 'D C']],
    ys: list[Float[Array, 'D C']],
    lower: bool,
  ) -> list[Float[Array, 'D C']]:
    """x y for each pair of arrays and of blocks, in upper lanes.

    The error is 2^-16 at most, whatever the arrays of the model. Arrays advance
    together, step by step, because each waits long for its own step before.

    Args:
      xs: in the lanes of the upper or of the lower blocks, as `lower` says.
      ys: in the lanes of the upper blocks.
      lower: as above.
    """
    if self.product.dtype == jnp.float32:
      both = zip(xs, ys, strict=True)
      return [self.product(x, self._twice(y)) for x, y in both]
    shift = CHUNK - self.size if lower else self.size
    high, rest = zip(*map(_halves, xs), strict=True)
    lefts = [
      x + pltpu.roll(y, shift, 1) for x, y in zip(high, rest, strict=True)
    ]
    y_high, y_rest = zip(*map(_halves, ys), strict=True)
    most = [
      self.product(x, self._twice(y))
      for x, y in zip(lefts, y_high, strict=True)
    ]
    less = [
      self.product(x, self._twice(y)) for x, y in zip(high, y_rest, strict=True)
    ]
    return [x + y for x, y in zip(most, less, strict=True)]

  def _twice(self, y: Float[Array, 'D C']) -> Float[Array, 'C C']:
    """y's rows in the place of the upper and of the lower blocks."""
    parts = []
    for i in range(0, CHUNK // 2, self.size):
      parts += [y[i : i + self.size]] * 2
    return jnp.concatenate(parts, axis=0)


def _halves(x: Float[Array, 'M N']) -> tuple[Array, Array]:
  """x rounded to bfloat16, and what that leaves out, both as float32."""
  high = x.astype(jnp.bfloat16).astype(jnp.float32)
  return high, x - high


def _join(
  inverses: list[Float[Array, 'C C']],
  couplings: list[Float[Array, 'C C']],
  pairs: Pairs,
) -> list[Float[Array, 'C C']]:
  """One step of the inverses: pairs of blocks of a size become blocks."""
  # Only the lower block of each pair changes.
  lower = [pairs.rows(x, lower=True) for x in inverses]
  upper = [pairs.rows(x, lower=False) for x in inverses]
  between = [pairs.in_upper_lanes(pairs.rows(x, lower=True)) for x in couplings]
  changes = pairs.multiply(lower, between, lower=True)
  changes = pairs.multiply(changes, upper, lower=False)
  joined = []
  for above, below, change in zip(upper, lower, changes, strict=True):
    parts = []
    for i in range(0, CHUNK // 2, pairs.size):
      at = slice(i, i + pairs.size)
      parts += [above[at], below[at] - change[at]]
    joined.append(jnp.concatenate(parts, axis=0))
  return joined
