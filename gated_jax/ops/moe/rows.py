"""Moves rows between the order of tokens and the order of experts.

Gathers in both directions, forward and backward: scatters are slow on TPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int


@jax.custom_vjp
def spread(
  x: Float[Array, 'M D'], choice: Int[Array, ' R'], slot: Int[Array, 'M k']
) -> Float[Array, 'R D']:
  """Row r is the token of choice[r]; the transpose of `collect`.

  `choice` and `slot` are inverse to one another: slot[m, j] is the row that
  choice m * k + j sits in, or R or more if it has none. A row that no choice
  sits in holds some token, and the reader of the rows knows which those are.
  """
  return jnp.take(x, choice // slot.shape[1], axis=0, mode='clip')


@jax.custom_vjp
def collect(
  rows: Float[Array, 'R D'], choice: Int[Array, ' R'], slot: Int[Array, 'M k']
) -> Float[Array, 'M D']:
  """Sums each token's rows, in float32; the transpose of `spread`."""
  del choice
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  tokens, k = slot.shape
  by_choice = jnp.take(rows, slot.T.reshape(-1), axis=0, mode='clip')
  total = jnp.zeros((), dtype)
  # A sum of k arrays, not over an axis of k: XLA:TPU would reduce that axis
  # within tiles, from a float32 copy.
  for j in range(k):
    part = by_choice[j * tokens : (j + 1) * tokens].astype(dtype)
    total += jnp.where((slot[:, j] < rows.shape[0])[:, None], part, 0)
  return total.astype(rows.dtype)


@jax.custom_vjp
def permute(
  rows: Float[Array, 'R D'], order: Int[Array, ' R'], rank: Int[Array, ' R']
) -> Float[Array, 'R D']:
  """rows[order]; `rank` is the inverse of `order`, for the gradient."""
  del rank
  return jnp.take(rows, order, axis=0, mode='clip')


permute.defvjp(
  lambda rows, order, rank: (permute(rows, order, rank), (order, rank)),
  lambda saved, grad: (permute(grad, saved[1], saved[0]), None, None),
)
spread.defvjp(
  lambda x, choice, slot: (spread(x, choice, slot), (choice, slot)),
  lambda saved, grad: (collect(grad, *saved), None, None),
)
collect.defvjp(
  lambda rows, choice, slot: (collect(rows, choice, slot), (choice, slot)),
  lambda saved, grad: (spread(grad, *saved), None, None),
)


def spread_weights(
  weights: Float[Array, 'M k'],
  choice: Int[Array, ' R'],
  slot: Int[Array, 'M k'],
) -> Float[Array, 'R 1']:
  """The weight of the choice that sits in each row."""
  return spread(weights.reshape(-1, 1), choice, slot.reshape(-1, 1))


def sort(keys: Int[Array, ' n']) -> tuple[Int[Array, ' n'], Int[Array, ' n']]:
  """A stable sort and its inverse: order[rank[i]] == i."""
  order = jnp.argsort(keys, stable=True).astype(jnp.int32)
  return order, jnp.argsort(order).astype(jnp.int32)


def count(ids: Int[Array, ' n'], size: int) -> Int[Array, ' size']:
  """How often each number below `size` occurs."""
  hits = ids[:, None] == jnp.arange(size, dtype=ids.dtype)
  return hits.sum(0, dtype=jnp.int32)
