"""Short filters over channels, on each device's rows, tokens and channels."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.model.mixer import Context
from gated_jax.ops.delta import context
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.convolution import convolve


def filter_on_mesh(
  x: Float[Array, 'B T C'],
  filters: Float[Array, 'W C'],
  ctx: Context,
  history: Float[Array, 'B I C'] | None,
  setting: str,
) -> Float[Array, 'B T C']:
  """Each channel's own filter over its last inputs, in the dtype of x.

  Args:
    x: inputs.
    filters: of each channel; the last weight is that of the token itself.
    ctx: documents, which share no inputs.
    history: the inputs before x; None: x holds all tokens.
    setting: name of the filter's width.
  """
  parts = 1 if history is not None else sharding.axis_size('length')
  axis = sharding.mesh_axes('length')[0] if parts > 1 else ''

  def run(x: Array, filters: Array, history: Any, segments: Any) -> Array:
    """The filter on the shard of one device."""
    if axis:
      x = context.as_rows(x)
      segments = None if segments is None else context.as_rows(segments)
      size = filters.shape[0] - 1
      history = inputs_before(x, segments, size, axis, setting)
    first = first_tokens(segments, axis)
    y = convolve(x, filters, history, first).astype(x.dtype)
    return context.from_rows(y) if axis else y

  rows, channels = ('batch', 'length'), 'mlp'
  axes = (
    (*rows, channels),
    (None, channels),
    ('batch', None, channels),
    rows,
  )
  filtered = sharding.per_device(run, axes, (*rows, channels))
  return filtered(x, filters, history, ctx.segments)


def first_tokens(segments: Int[Array, 'b t'] | None, axis: str) -> Any:
  """True where a token begins a document; None: they are all of one.

  Args:
    segments: document of each token, in this device's parts as rows.
    axis: the mesh axis that splits the sequence; '': none does.
  """
  if segments is None:
    return None
  before = context.previous_parts(segments[:, -1], axis) if axis else None
  return rule.first_tokens(segments, before)


def inputs_before(
  x: Float[Array, 'b t ...'],
  segments: Int[Array, 'b t'] | None,
  size: int,
  axis: str,
  setting: str,
) -> Float[Array, 'b I ...']:
  """The last inputs of the part before each of this device's parts.

  Those of a document that ended there are zeros.

  Args:
    x: inputs, in this device's parts as rows.
    segments: document of each token; None: they are all of one.
    size: how many inputs.
    axis: the mesh axis that splits the sequence.
    setting: name of the filter's width.

  Raises:
    ValueError: a part has fewer tokens.
  """
  length = x.shape[1]
  if length < size:
    raise ValueError(
      f'a part of {length} tokens on the mesh axis {axis} is shorter than the '
      f'{size} inputs that {setting}={size + 1} sums before a token: use fewer '
      'devices or longer rows'
    )
  inputs = x[:, length - size :]
  if segments is not None:
    same = segments[:, length - size :] == segments[:, -1:]
    inputs = jnp.where(
      same.reshape(*same.shape, *(1,) * (x.ndim - 2)), inputs, 0
    )
  return context.previous_parts(inputs, axis)
