"""Products of matrices inside the kernels, and the inverse by products.

The inverse is formed as `gated_jax/ops/delta/inverse.py` explains. Blocks of a
few rows are substituted on the vector units, side by side in a few registers;
larger ones are joined by products, of which only the lower rows of each pair of
blocks go through the matrix unit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

CHUNK = 128  # tokens
SUBLANES = 8
# Rows of the blocks that are substituted.
BLOCK = 32


class Products:
  """Products of matrices, as precise as the arrays that go in."""

  def __init__(self, dtype: jnp.dtype):
    self.dtype = dtype

  def __call__(
    self, a: Array, b: Array, of: tuple[int, int] = (1, 0)
  ) -> Float[Array, 'M N']:
    """Summed over axis `of[0]` of a and `of[1]` of b, in float32."""
    return self._dot(a.astype(self.dtype), b.astype(self.dtype), of)

  def precise(self, a: Array, b: Array) -> Float[Array, 'M N']:
    """a b with an error of 2^-16 at most, whatever the arrays of the model."""
    if self.dtype == jnp.float32:
      return self._dot(a, b, (1, 0))
    (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
    total = self._dot(a, b, (1, 0))
    return total + (self._dot(a, b_rest, (1, 0)) + self._dot(a_rest, b, (1, 0)))

  def _dot(self, a: Array, b: Array, of: tuple[int, int]) -> Array:
    wide = a.dtype == jnp.float32
    return jax.lax.dot_general(
      a,
      b,
      (((of[0],), (of[1],)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if wide else None,
      preferred_element_type=jnp.float32,
    )


def _halves(x: Float[Array, 'M N']) -> tuple[Array, Array]:
  """x in bfloat16, and what that leaves out."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def inverses_of(
  couplings: list[Float[Array, 'C C']], product: Products
) -> list[Float[Array, 'C C']]:
  """(I + strictly lower part of each)^-1, as `inverse.py` explains."""
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1)
  )
  size = BLOCK
  inverses = _substitute(couplings)
  while size < CHUNK:
    same = row // (2 * size) == column // (2 * size)
    quarter = same & (row // size > column // size)
    ys = [jnp.where(quarter, coupling, 0) for coupling in couplings]
    inverses = _join(inverses, ys, size, product)
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


def _join(
  inverses: list[Float[Array, 'C C']],
  ys: list[Array],
  size: int,
  product: Products,
) -> list[Float[Array, 'C C']]:
  """One step of the inverses: pairs of blocks of a size become blocks."""
  pairs = range(0, CHUNK, 2 * size)
  # Only the lower block of each pair changes.
  lower = [
    jnp.concatenate([x[i + size : i + 2 * size] for i in pairs], axis=0)
    for x in inverses
  ]
  products = [product.precise(x, y) for x, y in zip(lower, ys, strict=True)]
  products = [
    product.precise(x, y) for x, y in zip(products, inverses, strict=True)
  ]
  joined = []
  for x, low, change in zip(inverses, lower, products, strict=True):
    low -= change
    parts = []
    for i in pairs:
      parts += [x[i : i + size], low[i // 2 : i // 2 + size]]
    joined.append(jnp.concatenate(parts, axis=0))
  return joined
