"""A matrix plus a product of two thin ones (LoRA, arXiv 2106.09685).

    W [..., I..., O...]    A [..., I..., r]    B [..., r, O...]

The sum is made where the matrix is taken from its parameter: in each layer of a
scan, and again in the backward pass with remat. So whatever multiplies by a
matrix (products of two matrices, grouped ones of experts, fused kernels) knows
nothing of adapters, and a model whose adapters are merged computes the same.
The price is the gradient of the sum, which adds a product as large as that of
training the matrix itself; moments and updates stay as small as A and B.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

# After the name of a matrix, the names of its A and B.
NAMES = ('_lora_a', '_lora_b')


def product(
  a: Float[Array, '...'], b: Float[Array, '...'], inputs: int, stacked: int
) -> Float[Array, '...']:
  """A B with the axes of the matrix that it is added to, in float32.

  Args:
    a: axes of a stack, inputs, rank.
    b: axes of a stack, rank, outputs.
    inputs: how many axes the matrix sums over.
    stacked: how many axes count matrices: layers, experts.
  """
  last = stacked + inputs
  stack, rank = a.shape[:stacked], a.shape[-1]
  rows, columns = a.shape[stacked:last], b.shape[stacked + 1 :]
  flat = jnp.matmul(
    a.reshape(*stack, math.prod(rows), rank),
    b.reshape(*stack, rank, math.prod(columns)),
    precision=jax.lax.Precision.HIGHEST,
  )
  return flat.reshape(*stack, *rows, *columns)


def add_product(
  matrix: Float[Array, '...'],
  a: Float[Array, '...'],
  b: Float[Array, '...'],
  scale: float,
  inputs: int,
) -> Float[Array, '...']:
  """matrix + scale A B, in float32 where the matrix is narrower.

  Args:
    matrix: axes of a stack, inputs, outputs.
    a: axes of a stack, inputs, rank.
    b: axes of a stack, rank, outputs.
    scale: of the product.
    inputs: how many axes the matrix sums over.
  """
  added = product(a, b, inputs, a.ndim - 1 - inputs)
  wide = jnp.promote_types(matrix.dtype, added.dtype)
  return matrix.astype(wide) + scale * added
