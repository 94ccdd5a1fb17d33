"""Arithmetic of the TPU kernels on blocks: products, rows and columns.

A number for each row of a block can lie in a column [R, 1], of which a vector
register holds eight and wastes the rest, or in a row [1, R], of which it holds
a thousand.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gated_jax.chips import LANES
from gated_jax.ops.gate import ACTIVATIONS
from gated_jax.ops.gate import Activation


def _sigmoid(x: Array) -> Array:
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def _one_less_sigmoid(x: Array) -> Array:
  return 0.5 - 0.5 * jnp.tanh(0.5 * x)


def _slope(x: Array) -> Array:
  return _sigmoid(x) * _one_less_sigmoid(x)


# Activations by one tanh, which value and derivative share, in place of two
# exponentials and two divisions: a third of the work. The absolute error is
# 1e-7, far below what 16 bits can hold of a product with Y, but the relative
# error of a shut gate is larger.
_FAST = {
  'sigmoid': Activation(_sigmoid, _slope, _one_less_sigmoid),
  'two_sigmoid': Activation(
    lambda x: 2 * _sigmoid(x), lambda x: 2 * _slope(x), _one_less_sigmoid
  ),
  'ns_sigmoid': Activation(
    lambda x: 0.5 + 0.5 * _sigmoid(x),
    lambda x: 0.5 * _slope(x),
    lambda x: _slope(x) / (1 + _sigmoid(x)),
  ),
  'silu': Activation(
    lambda x: x * _sigmoid(x),
    lambda x: _sigmoid(x) * (1 + x * _one_less_sigmoid(x)),
    None,
  ),
}


def activation_of(name: str, dtype: jnp.dtype) -> Activation:
  """How kernels on arrays of this dtype compute an activation."""
  narrow = jnp.finfo(dtype).bits < 32
  return (narrow and _FAST.get(name)) or ACTIVATIONS[name]


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """Matrix product in float32, contracting these axes of a and b."""
  exact = jnp.float32 in (a.dtype, b.dtype)
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def to_row(column: Array) -> Array:
  """[R, 1] or [R, 128] of equal columns to [1, R].

  Each square is masked to its diagonal and summed. That is a few vector
  operations; a transpose would take the whole square through the cross-lane
  unit.
  """
  squares = range(0, column.shape[0], LANES)
  return jnp.concatenate(
    [
      jnp.sum(_on_diagonal(column[r : r + LANES]), axis=0, keepdims=True)
      for r in squares
    ],
    axis=1,
  )


def to_column(row: Array) -> Array:
  """[1, R] to [R, 128] of equal columns."""
  squares = range(0, row.shape[1], LANES)
  columns = [
    jnp.sum(_on_diagonal(row[:, r : r + LANES]), axis=1, keepdims=True)
    for r in squares
  ]
  return jnp.concatenate([jnp.broadcast_to(c, (LANES, LANES)) for c in columns])


def _on_diagonal(x: Array) -> Array:
  square = (LANES, LANES)
  diagonal = lax.broadcasted_iota(jnp.int32, square, 0)
  diagonal = diagonal == lax.broadcasted_iota(jnp.int32, square, 1)
  return jnp.where(diagonal, x, jnp.zeros_like(x))


def broadcast_lanes(column: Array, width: int) -> Array:
  """[R, 128] of equal columns to [R, width]."""
  if width <= LANES:
    return column[:, :width]
  return jnp.concatenate([column] * (width // LANES), axis=1)
