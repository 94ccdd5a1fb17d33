"""Exclusive self-attention: what a token adds is not its own value again.

    Y' = Y - (Y . v) v / (v . v)        v: the token's own value

Attention that cannot close may look at the token itself to add little that is
new; without the part along its value that way out is shut (arXiv 2603.09078).
It stands where a gate on the output would and has no parameters.
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def without_own_value(
  y: Float[Array, 'B T N H'], value: Float[Array, 'B T K H']
) -> Float[Array, 'B T N H']:
  """Each head's output less its projection on its token's own value.

  Args:
    y: outputs of heads; each kv head belongs to N / K of them in a row.
    value: values of the same tokens. A value of zeros takes nothing away.

  Raises:
    ValueError: the values are of another number of tokens, as in attention
      to another sequence, whose tokens have no value of their own.
  """
  if y.shape[:2] != value.shape[:2]:
    raise ValueError(
      f"gate.kind='exclusive' takes away a token's own value, and {y.shape[1]} "
      f'tokens attend to {value.shape[1]} others'
    )
  kv_heads = value.shape[2]
  grouped = y.reshape(*y.shape[:2], kv_heads, -1, y.shape[-1])
  dtype = jnp.promote_types(y.dtype, jnp.float32)
  grouped, own = grouped.astype(dtype), value.astype(dtype)
  square = jnp.sum(own * own, axis=-1)
  along = jnp.einsum('BTKGH,BTKH->BTKG', grouped, own)
  share = along / jnp.where(square > 0, square, 1.0)[..., None]
  rest = grouped - share[..., None] * own[:, :, :, None]
  return rest.reshape(y.shape).astype(y.dtype)
