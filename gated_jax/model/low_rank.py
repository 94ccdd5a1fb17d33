"""A matrix plus a product of two thin ones (LoRA, arXiv 2106.09685).

    W [..., I..., O...]    A [..., I..., r]    B [..., r, O...]

    y = x W + scale (x A) B        what `gated_jax/model/linear.py` computes
    W + scale A B                  what grouped products of experts multiply by

Beside the product, an adapter costs little, a frozen W gets no gradient, and
dropout can act on the adapter's input. The sum of matrices serves whatever
multiplies by an array of its own: it is made in each layer of a scan, and again
in the backward pass with remat, and its gradient is as large as that of W.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
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


@struct.dataclass
class Adapter:
  """A and B of one matrix, or of a stack, with what is needed to apply them."""

  a: Float[Array, '...']
  b: Float[Array, '...']
  scale: float = struct.field(pytree_node=False)
  # How many axes the matrix sums over.
  inputs: int = struct.field(pytree_node=False)
  # The share of A's inputs that is dropped, and the key that chooses them;
  # None: nothing is dropped.
  dropout: float = struct.field(default=0.0, pytree_node=False)
  key: Array | None = None

  def added_to(self, matrix: Float[Array, '...']) -> Float[Array, '...']:
    """matrix + scale A B."""
    return add_product(matrix, self.a, self.b, self.scale, self.inputs)

  def beside(
    self, x: Float[Array, '... I'], precision: Any = None
  ) -> Float[Array, '... O']:
    """scale (x A) B of one matrix whose inputs, and outputs, are one axis.

    Args:
      x: activations, in the dtype of the products.
      precision: of the products.
    """
    rank = self.a.shape[-1]
    if self.key is not None:
      share = 1 - self.dropout
      stays = jax.random.bernoulli(self.key, share, x.shape)
      x = jnp.where(stays, x / share, 0).astype(x.dtype)
    a = self.a.reshape(-1, rank).astype(x.dtype)
    b = (self.scale * self.b.reshape(rank, -1)).astype(x.dtype)
    thin = jnp.matmul(x, a, precision=precision)
    return jnp.matmul(thin, b, precision=precision)
