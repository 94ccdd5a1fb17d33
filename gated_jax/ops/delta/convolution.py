"""A short causal filter over each channel, which documents do not share.

    y_t = sum_i w_i x_(t - W + 1 + i)     w_(W-1) multiplies the token itself

Tokens of another document, and those before the first one, count as zeros. The
state is the last W - 1 inputs.
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float


def convolve(
  x: Float[Array, 'B T ...'],
  filters: Float[Array, 'W ...'],
  history: Float[Array, 'B H ...'] | None = None,
  first: Bool[Array, 'B T'] | None = None,
) -> Float[Array, 'B T ...']:
  """Each channel's own filter over its last W inputs, in float32.

  Args:
    x: inputs.
    filters: of each channel.
    history: the W - 1 inputs before them; None: zeros.
    first: True at the first token of a document; None: nowhere.
  """
  width, length = filters.shape[0], x.shape[1]
  if history is None:
    history = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  inputs = jnp.concatenate([history.astype(x.dtype), x], axis=1)
  document = None
  if first is not None:
    begun = jnp.cumsum(first, axis=1)
    document = jnp.pad(begun, [(0, 0), (width - 1, 0)])
  y = jnp.zeros(x.shape, wide)
  for i in range(width):
    term = inputs[:, i : i + length].astype(wide) * filters[i].astype(wide)
    if document is not None:
      same = document[:, i : i + length] == document[:, width - 1 :]
      term = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), term, 0)
    y += term
  return y


def extend(
  history: Float[Array, 'B H ...'],
  x: Float[Array, 'B T ...'],
  valid: Bool[Array, 'B T'] | None = None,
) -> Float[Array, 'B H ...']:
  """The last inputs once x has been seen.

  Args:
    history: the last inputs before.
    x: new ones.
    valid: those that are not padding, which stands at the end; None: all.
  """
  size = history.shape[1]
  inputs = jnp.concatenate([history, x.astype(history.dtype)], axis=1)
  if valid is None:
    return inputs[:, inputs.shape[1] - size :]
  at = jnp.sum(valid, axis=1)[:, None] + jnp.arange(size)
  at = at.reshape(*at.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(inputs, at, axis=1)
