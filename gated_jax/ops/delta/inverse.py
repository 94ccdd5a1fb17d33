"""The inverse of I + A, A strictly lower triangular, by products alone.

Two halves of a triangular matrix are inverted apart, then joined:

    [ X   0 ]^-1   [  X^-1             0   ]
    [ Y   Z ]    = [ -Z^-1 Y X^-1    Z^-1  ]

Beginning with the diagonal, log2(n) such joins invert all blocks of one size at
once. A matrix unit does this; substitution would be n steps on vectors. It is
as precise as the inverses of the blocks are small, which `chunks.py` shows of
its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, '*b n n']) -> Float[Array, '*b n n']:
  """(I + a)^-1, in the dtype of `a`.

  Args:
    a: zero on the diagonal and above it; n is a power of two.
  """
  n = a.shape[-1]
  place = np.arange(n)
  inverse = jnp.eye(n, dtype=a.dtype)
  size = 1
  while size < n:
    block, half = place // (2 * size), place // size
    # The lower left quarters of the blocks that this step joins.
    quarter = (block[:, None] == block) & (half[:, None] > half)
    y = jnp.where(quarter, a, 0)
    if size == 1:
      inverse = inverse - y
    else:
      inverse = inverse - _product(_product(inverse, y), inverse)
    size *= 2
  return jnp.broadcast_to(inverse, a.shape)


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _forward(a: Array) -> tuple[Array, Array]:
  inverse = unit_lower_inverse(a)
  return inverse, inverse


def _backward(inverse: Array, slope: Array) -> tuple[Array]:
  """d(X^-1) = -X^-1 dX X^-1."""
  transposed = jnp.swapaxes(inverse, -1, -2)
  return (-_product(_product(transposed, slope), transposed),)


unit_lower_inverse.defvjp(_forward, _backward)
