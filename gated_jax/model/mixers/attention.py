"""Softmax attention with a gate at one of the paper's five positions.

    q, k, v = x W_q, x W_k, x W_v          gated here: query, key, value
    Y  = softmax(q k^T / sqrt(H)) v
    Y' = Y * sigmoid(x W_g)                gated here: sdpa_output, the best
    Y' W_o                                 gated here: dense_output

This is the file to read and to copy. Beside it stand `attend.py` (the product
itself, on a mesh and with a cache), `probes.py` (numbers for a curious reader)
and `../gate.py` (the gate's parameters). The mathematics is in
`gated_jax/ops/gate.py` and `gated_jax/ops/attention/xla.py`.
"""

import dataclasses
from typing import Any
from typing import ClassVar

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.model.fused_norm_rope import norm_and_rotate
from gated_jax.model.fused_norm_rope import on_tpu
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.gate import Gate
from gated_jax.model.gate import apply_gate
from gated_jax.model.gate import gate_logits
from gated_jax.model.layers import Kernel
from gated_jax.model.layers import Matrix
from gated_jax.model.layers import Scale
from gated_jax.model.layers import project
from gated_jax.model.layers import project_both
from gated_jax.model.layers import rms_norm
from gated_jax.model.mixer import Context
from gated_jax.model.mixers import attend as attention
from gated_jax.model.mixers import probes
from gated_jax.ops import rope


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
  """Sizes and kinds of one attention layer."""

  heads: int
  kv_heads: int
  head_dim: int
  gate: GateConfig = GateConfig()
  causal: bool = True
  window: int = 0  # keys a query sees, itself included; 0: all
  dropout: float = 0.0  # of attention weights
  qk_norm: bool = False  # RMSNorm of each query's and key's head
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  implementation: str = 'auto'


def kernel(
  layer: AttentionLayer,
  name: str,
  shape: tuple[int, ...],
  axes: sharding.Axes,
  inputs: int = 1,
) -> Matrix:
  """A projection's matrix, owned by the calling module under this name."""
  kinds = (layer.init_std, layer.param_dtype)
  return Kernel(shape, axes, inputs, *kinds, name=name)()


def gate_matrix(
  layer: AttentionLayer,
  x: Float[Array, 'B T D'],
  shape: tuple[int, ...],
  axes: sharding.Axes,
) -> Matrix:
  """The gate's matrix, owned by the calling module as `gate`."""
  gate = Gate(
    layer.gate, x.shape[-1], shape, axes, layer.param_dtype, name='gate'
  )
  return gate()


def gated_attention(
  module: nn.Module,
  layer: AttentionLayer,
  inputs: tuple[Array, Array, Array],
  call: attention.Call,
  rotation: rope.Rotation | None = None,
) -> tuple[Float[Array, 'B T D'], attention.KV | None]:
  """One layer: projects, attends, gates, and projects back.

  Args:
    module: its owner; the parameters are {query, key, value, out}/kernel,
      gate/kernel or gate/scores, and {query, key}_norm/scale.
    layer: sizes and kinds.
    inputs: what queries and the gate, keys, and values are computed from; one
      array three times is self-attention.
    call: documents, padding, cache and dropout.
    rotation: of queries and keys.

  Returns:
    The output, as wide as the first input, and the cache with these tokens.
  """
  x, heads, width = inputs[0], layer.heads, layer.head_dim
  of_query, of_key = ('heads', 'head_dim'), ('kv_heads', 'head_dim')

  def gated_at(position: str, y: Array, x: Array, axes: sharding.Axes) -> Array:
    """y, gated where the config's gate stands at this position."""
    if layer.gate.position != position:
      return y
    matrix = gate_matrix(layer, x, y.shape[2:], axes)
    logits = gate_logits(layer.gate, matrix, x, layer.dtype)
    probes.sow_gate(module, layer.gate, logits, call.valid)
    return apply_gate(layer.gate, y, logits)

  def project_heads(
    name: str, x: Array, heads: int, axes: sharding.Axes
  ) -> Array:
    matrix = kernel(layer, name, (x.shape[-1], heads, width), ('embed', *axes))
    y = project(x, matrix, layer.dtype, f'{name}_projection')
    y = sharding.constrain(y, 'batch', 'length', axes[0], None)
    return gated_at(name, y, x, axes)

  query = project_heads('query', x, heads, of_query)
  logits = None
  if _key_and_gate_share_product(layer) and inputs[1] is x:
    narrow = gate_matrix(layer, x, (heads, width), of_query)
    shape = (x.shape[-1], layer.kv_heads, width)
    wide = kernel(layer, 'key', shape, ('embed', *of_key))
    key, logits = project_both(x, wide, narrow, layer.dtype, 'key_projection')
    logits = checkpoint_name(logits, LOGITS_NAME)[..., None]
  else:
    # The backward pass adds up the gradients of x in the reverse of this order.
    # The sum is free as the epilogue of a matmul as wide as the gate's.
    if layer.gate.scores_output:
      matrix = gate_matrix(layer, x, (heads, width), of_query)
      logits = gate_logits(layer.gate, matrix, x, layer.dtype)
    key = project_heads('key', inputs[1], layer.kv_heads, of_key)
  value = project_heads('value', inputs[2], layer.kv_heads, of_key)
  if logits is not None:
    probes.sow_gate(module, layer.gate, logits, call.valid)

  def norm_rope(y: Array, norm: str, axis: str) -> Array:
    scale = head_scale(layer, norm) if layer.qk_norm else None
    return norm_and_rotate(
      y,
      scale,
      rotation,
      eps=layer.norm_eps,
      axis=axis,
      implementation=layer.implementation,
    )

  query = norm_rope(query, 'query_norm', 'heads')
  key = norm_rope(key, 'key_norm', 'kv_heads')
  output, cache = attention.attend(
    module, layer, (query, key, value, logits), call
  )
  if layer.gate.kind == 'rms_norm':
    scale = head_scale(layer, 'output_norm')
    output = rms_norm(output, scale, layer.norm_eps)
  elif layer.gate.kind == 'silu':
    output = jax.nn.silu(output)
  shape = (heads, width, call.out_features or x.shape[-1])
  out = kernel(layer, 'out', shape, (*of_query, 'embed'), inputs=2)
  result = project(output, out, layer.dtype)
  result = sharding.constrain(result, *sharding.RESIDUAL)
  return gated_at('dense_output', result, x, (None,)), cache


def head_scale(layer: AttentionLayer, name: str) -> Float[Array, ' H']:
  """The scale of a norm over each head, owned by the calling module."""
  kinds = (layer.norm_zero_centered, layer.param_dtype)
  return Scale(layer.head_dim, *kinds, name=name)()


def _key_and_gate_share_product(layer: AttentionLayer) -> bool:
  """Whether the key projection and a headwise gate share one matmul.

  One backward matmul then yields both input gradients. TPU only (slower
  elsewhere), and only with heads that are not split over devices.
  """
  gate = layer.gate
  return (
    gate.fused
    and gate.granularity == 'headwise'
    and not gate.channels
    and sharding.axis_size('heads') == 1
    and on_tpu(layer.implementation)
  )


class Attention(nn.Module):
  """Causal self-attention as a layer of a decoder; a `Mixer`."""

  config: ModelConfig
  layer: LayerSpec
  splits_sequence: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], ctx: Context, state: attention.KV | None
  ) -> tuple[Float[Array, 'B T D'], attention.KV | None]:
    c, spec = self.config, self.layer
    layer = AttentionLayer(
      heads=spec.heads,
      kv_heads=spec.kv_heads,
      head_dim=spec.head_dim,
      gate=c.gate,
      window=spec.window,
      dropout=0.0 if ctx.deterministic else c.dropout,
      qk_norm=c.qk_norm,
      norm_eps=c.norm_eps,
      norm_zero_centered=c.norm_zero_centered,
      init_std=c.init_std,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      implementation=c.attention,
    )
    call = attention.Call(
      segments=ctx.segments,
      valid=ctx.valid,
      cache=state,
      cache_length=ctx.cache_length,
      skip_below=ctx.skip_below,
    )
    rotation = ctx.rotation(c, spec)
    return gated_attention(self, layer, (x, x, x), call, rotation)

  @staticmethod
  def init_state(
    config: ModelConfig,
    layer: LayerSpec,
    batch: int,
    length: int,
    dtype: Any,
    stack: tuple[int, ...],
  ) -> attention.KV:
    """Zero keys and values with room for `length` tokens in each row."""
    shape = (*stack, batch, layer.kv_heads, length, layer.head_dim)
    return attention.empty_cache(shape, dtype)

  @staticmethod
  def flops(config: ModelConfig, layer: LayerSpec, length: int) -> float:
    """q k^T and the sum over v, for the keys that causality leaves visible."""
    window = min(layer.window or length, length)
    seen = window - window * (window - 1) / (2 * length)
    return 2 * 2 * layer.heads * layer.head_dim * seen
