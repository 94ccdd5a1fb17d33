"""Filters and the gated delta rule on each device's heads, rows and tokens."""

from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.model.mixer import Context
from gated_jax.model.mixers.filter_on_mesh import first_tokens
from gated_jax.model.mixers.filter_on_mesh import inputs_before
from gated_jax.ops.delta import context
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.filtering import filtered_heads
from gated_jax.ops.delta.gated_norm import gated_norm
from gated_jax.ops.delta.inputs import Inputs

KEY = ('kv_heads', 'head_dim')
VALUE = ('heads', 'head_dim')
# The three arrays that pass a filter, with the axes of their heads.
FILTERED = {'query': KEY, 'key': KEY, 'value': VALUE}
_ROWS = ('batch', 'length')
_MEMORY = ('batch', 'heads', None, None)


class DeltaState(NamedTuple):
  """A layer's knowledge of the tokens before."""

  memory: Float[Array, '*layers B N H V']  # float32
  # The last filter_width - 1 inputs of each filter: [*layers, B, I, heads, ...]
  inputs: tuple[Array, Array, Array]


class DeltaArrays(NamedTuple):
  """Arrays that a layer makes of its input."""

  # Query, key and value before their filters: [B, T, heads, ...].
  raw: tuple[Array, ...]
  filters: tuple[Array, ...]  # [W, heads, ...]
  log_decay: Float[Array, 'B T N']
  beta: Float[Array, 'B T N']


def delta_on_mesh(
  arrays: DeltaArrays,
  ctx: Context,
  state: DeltaState | None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N H V'] | None]:
  """Computes what each token reads, in the model's dtype, and the new memory.

  Args:
    arrays: made of the layer's input.
    ctx: documents and padding.
    state: before these tokens; None: they are all, and there is no new memory.
    implementation: of the rule.
  """
  parts = 1 if state is not None else sharding.axis_size('length')
  axis = sharding.mesh_axes('length')[0] if parts > 1 else ''
  history: Any = (None,) * 3 if state is None else state.inputs
  memory = None if state is None else state.memory
  raw, filters, history = map(
    _one_key_head_each, (arrays.raw, arrays.filters, history)
  )

  def run(*shards: Any) -> tuple[Array, Array | None]:
    """The layer's rule on the shard of one device."""
    raw, filters, history = shards[:3], shards[3:6], shards[6:9]
    tokens, memory = shards[9:13], shards[13]
    if axis:
      raw = tuple(context.as_rows(x) for x in raw)
      tokens = tuple(None if x is None else context.as_rows(x) for x in tokens)
    log_decay, beta, segments, valid = tokens
    if axis:
      how = filters[0].shape[0] - 1, axis, 'model.delta.filter_width'
      history = tuple(inputs_before(x, segments, *how) for x in raw)
    first = first_tokens(segments, axis)
    query, key, value = _filtered(
      (raw, filters), history, first, implementation
    )
    inputs = Inputs(query, key, value, log_decay, beta).without_padding(valid)
    if axis:
      output = context.delta_rule_in_parts(inputs, first, axis, implementation)
      return context.from_rows(output).astype(value.dtype), None
    output, new = rule.delta_rule(inputs, memory, first, implementation)
    return output.astype(value.dtype), None if memory is None else new

  heads = [axes[0] for axes in FILTERED.values()]
  heads_of_tokens = (*_ROWS, 'heads')
  axes = (
    *[(*_ROWS, name, None) for name in heads],
    *[(None, name, None) for name in heads],
    *[('batch', None, name, None) for name in heads],
    *(heads_of_tokens, heads_of_tokens, _ROWS, _ROWS, _MEMORY),
  )
  outputs = ((*heads_of_tokens, None), None if memory is None else _MEMORY)
  return sharding.per_device(run, axes, outputs)(
    *(*raw, *filters, *history, arrays.log_decay, arrays.beta),
    *(ctx.segments, ctx.valid, memory),
  )


def gated_norm_on_mesh(
  y: Float[Array, 'B T N V'],
  logits: Float[Array, 'B T N V'],
  scale: Float[Array, ' V'],
  config: ModelConfig,
) -> Float[Array, 'B T N V']:
  """What heads read, normed and gated, on each device's heads and tokens."""
  sizes = config.delta

  def run(y: Array, logits: Array, scale: Array) -> Array:
    """The norm and the gate on the shard of one device."""
    eps = sizes.norm_eps or config.norm_eps
    how = eps, sizes.gate, sizes.implementation
    return gated_norm(y, logits, scale, *how)

  heads = (*_ROWS, 'heads', None)
  return sharding.per_device(run, (heads, heads, (None,)), heads)(
    y, logits, scale
  )


def _filtered(
  arrays: tuple[tuple[Array, ...], tuple[Array, ...]],
  history: tuple[Array | None, ...],
  first: Bool[Array, 'B T'] | None,
  implementation: str,
) -> tuple[Array, ...]:
  """Query, key and value as the rule takes them, in the model's dtype."""
  raw, filters = arrays
  scales = raw[0].shape[-1] ** -0.5, 1.0, 0.0
  return tuple(
    filtered_heads(x, w, (before, first), scale, implementation)
    for x, w, before, scale in zip(raw, filters, history, scales, strict=True)
  )


def _one_key_head_each(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
  """Query, key and value, the heads of the first two for every device.

  Where there are more devices than key heads, each gets a copy of the one that
  its value heads are served by.
  """
  query, key, value = arrays
  if query is None:
    return arrays
  copies = sharding.axis_size('kv_heads') // query.shape[-2]
  if copies > 1:
    query, key = (jnp.repeat(x, copies, axis=-2) for x in (query, key))
  return query, key, value
