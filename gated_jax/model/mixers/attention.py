"""Softmax attention with a gate at one of the paper's five positions.

    q, k, v = x W_q, x W_k, x W_v          gated here: query, key, value
    Y  = softmax(q k^T / sqrt(H)) v
    Y' = Y * sigmoid(x W_g)                gated here: sdpa_output, the best
    Y' W_o                                 gated here: dense_output

This is the file to read and to copy. Beside it stand `attend.py` (the product
itself, on a mesh and with a cache), `owned.py` and `../gate.py` (parameters),
`probes.py` (numbers for a curious reader) and `../multi_head.py` (the layer for
other people's models). The mathematics is in `gated_jax/ops/gate.py` and
`gated_jax/ops/attention/xla.py`.
"""

from typing import NamedTuple

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.model.fused_norm_rope import norm_and_rotate
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.gate import apply_gate
from gated_jax.model.gate import gate_logits
from gated_jax.model.gate import key_and_gate_share_product
from gated_jax.model.layers import rms_norm
from gated_jax.model.linear import project
from gated_jax.model.linear import project_both
from gated_jax.model.mixers import attend as attention
from gated_jax.model.mixers import probes
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.model.mixers.owned import gate_matrix
from gated_jax.model.mixers.owned import in_place_of_a_gate
from gated_jax.model.mixers.owned import kernel
from gated_jax.model.mixers.owned import norm_scale
from gated_jax.ops import rope

# Logical axes of the heads of queries, and of keys and values.
QUERY = ('heads', 'head_dim')
KEY = ('kv_heads', 'head_dim')
Valid = Bool[Array, 'B T'] | None  # tokens that are not padding


class Turns(NamedTuple):
  """What the position of a token does to its query, and to its key."""

  rotation: rope.Rotation | None = None  # of both
  growth: Float[Array, 'B T'] | None = None  # a factor of the query alone


def gated_attention(
  module: nn.Module,
  layer: AttentionLayer,
  inputs: tuple[Array, Array, Array],
  call: attention.Call,
  turns: Turns = Turns(),
) -> tuple[Float[Array, 'B T D'], attention.KV | None]:
  """One layer: projects, attends, gates, and projects back.

  Args:
    module: its owner; the parameters are {query, key, value, out}/kernel,
      gate/kernel or gate/scores, and {query, key}_norm/scale.
    layer: sizes and kinds.
    inputs: the arrays that queries and the gate, keys, and values are computed
      from; one array three times is self-attention.
    call: documents, padding, cache and dropout.
    turns: of queries and keys by their positions.

  Returns:
    The output, as wide as the first input, and the cache with these tokens.
  """
  query, key, value, logits = project_inputs(module, layer, inputs, call.valid)
  query = _norm_and_rotate(layer, query, turns.rotation, 'heads')
  key = _norm_and_rotate(layer, key, turns.rotation, 'kv_heads')
  if turns.growth is not None:
    query = (query * turns.growth[..., None, None]).astype(query.dtype)
  # The gate at sdpa_output is applied inside.
  arrays = (query, key, value, logits)
  output, cache = attention.attend(module, layer, arrays, call)
  given = (output, inputs[0], value)
  return project_output(module, layer, given, call), cache


def project_inputs(
  module: nn.Module,
  layer: AttentionLayer,
  inputs: tuple[Array, Array, Array],
  valid: Valid = None,
) -> tuple[Array, Array, Array, Array | None]:
  """Queries, keys and values, and the logits of a gate at sdpa_output."""
  x, x_key, x_value = inputs
  query = heads_of(layer, 'query', x, QUERY)
  query = _gated_at('query', module, layer, (query, x), QUERY, valid)
  key, logits = _key_and_gate(layer, x, x_key)
  key = _gated_at('key', module, layer, (key, x_key), KEY, valid)
  value = heads_of(layer, 'value', x_value, KEY)
  value = _gated_at('value', module, layer, (value, x_value), KEY, valid)
  if logits is not None:
    probes.sow_gate(module, layer.gate, logits, valid)
  return query, key, value, logits


def project_output(
  module: nn.Module,
  layer: AttentionLayer,
  arrays: tuple[Array, Array, Array],
  call: attention.Call,
) -> Float[Array, 'B T M']:
  """The outputs of heads, projected back.

  `arrays` are outputs of heads [B, T, N, H], the layer's input [B, T, D], and
  the values of the same tokens [B, T, K, H].
  """
  output, x, value = arrays
  output = in_place_of_a_gate(layer, output, value)
  shape = (*output.shape[2:], call.out_features or x.shape[-1])
  out = kernel(layer, 'out', shape, (*QUERY, 'embed'), inputs=2)
  y = project(output, out, layer.dtype)
  y = sharding.constrain(y, *sharding.RESIDUAL)
  return _gated_at('dense_output', module, layer, (y, x), (None,), call.valid)


def _gated_at(
  position: str,
  module: nn.Module,
  layer: AttentionLayer,
  arrays: tuple[Array, Array],
  axes: sharding.Axes,
  valid: Valid,
) -> Array:
  """The first array, scaled by the gate of the second where one stands here."""
  y, x = arrays
  if layer.gate.position != position:
    return y
  matrix = gate_matrix(layer, x, y.shape[2:], axes)
  logits = gate_logits(layer.gate, matrix, x, layer.dtype)
  probes.sow_gate(module, layer.gate, logits, valid)
  return apply_gate(layer.gate, y, logits)


def heads_of(
  layer: AttentionLayer, name: str, x: Array, axes: sharding.Axes
) -> Float[Array, 'B T N H']:
  """x projected to the heads of queries, keys or values."""
  heads = layer.heads if axes == QUERY else layer.kv_heads
  shape = (x.shape[-1], heads, layer.head_dim)
  matrix = kernel(layer, name, shape, ('embed', *axes))
  y = project(x, matrix, layer.dtype, f'{name}_projection')
  return sharding.constrain(y, 'batch', 'length', axes[0], None)


def _key_and_gate(
  layer: AttentionLayer, x: Array, source: Array
) -> tuple[Float[Array, 'B T K H'], Array | None]:
  """Keys of `source`, and the logits that x has for a gate at sdpa_output."""
  if not layer.gate.scores_output:
    return heads_of(layer, 'key', source, KEY), None
  matrix = gate_matrix(layer, x, (layer.heads, layer.head_dim), QUERY)
  shared = key_and_gate_share_product(layer.gate, layer.implementation)
  if shared and source is x:
    shape = (x.shape[-1], layer.kv_heads, layer.head_dim)
    wide = kernel(layer, 'key', shape, ('embed', *KEY))
    key, logits = project_both(x, wide, matrix, layer.dtype, 'key_projection')
    return key, checkpoint_name(logits, LOGITS_NAME)[..., None]
  # Gate before key: the backward pass adds up the gradients of x in reverse,
  # and the sum is free as the epilogue of a matmul as wide as the gate's.
  logits = gate_logits(layer.gate, matrix, x, layer.dtype)
  return heads_of(layer, 'key', source, KEY), logits


def _norm_and_rotate(
  layer: AttentionLayer,
  y: Float[Array, 'B T N H'],
  rotation: rope.Rotation | None,
  axis: str,
) -> Float[Array, 'B T N H']:
  """Queries or keys, as far as their norm, factor and rotation go."""
  of_query = axis == 'heads'
  factor = layer.query_scale if of_query else 1.0
  scale = norm_scale(layer, 'query_norm' if of_query else 'key_norm', factor)
  if scale is None and factor != 1:
    y = y * factor
  kind, eps = layer.implementation, layer.norm_eps
  if layer.qk_norm_joint and scale is not None:
    # A mean over heads that lie on several devices: XLA sums it up.
    joined = rms_norm(y.reshape(*y.shape[:2], -1), scale, eps)
    y, scale = joined.reshape(y.shape), None
    y = sharding.constrain(y, 'batch', 'length', axis, None)
  return norm_and_rotate(y, scale, rotation, kind, eps=eps, axis=axis)
