"""Causal self-attention as a layer of a decoder; `attention.py` computes it."""

from typing import Any
from typing import ClassVar

from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.model.linear import Making
from gated_jax.model.mixer import Context
from gated_jax.model.mixers import attend as attention
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.model.mixers.attention import Turns
from gated_jax.model.mixers.attention import gated_attention


class SelfAttention(nn.Module):
  """Gated softmax attention to earlier tokens; a `Mixer`."""

  config: ModelConfig
  layer: LayerSpec
  splits_sequence: ClassVar[bool] = True
  restarts_by_document: ClassVar[bool] = False

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], ctx: Context, state: attention.KV | None
  ) -> tuple[Float[Array, 'B T D'], attention.KV | None]:
    c, spec, zeros = self.config, self.layer, nn.initializers.zeros
    layer = AttentionLayer(
      heads=spec.heads,
      kv_heads=spec.kv_heads,
      head_dim=spec.head_dim,
      gate=c.gate,
      window=spec.window,
      dropout=0.0 if ctx.deterministic else c.dropout,
      qk_norm=c.qk_norm,
      qk_norm_scale=c.qk_norm_scale,
      qk_norm_joint=c.qk_norm_joint,
      head_norm=c.head_norm,
      query_scale=c.query_scale,
      norm_eps=c.norm_eps,
      norm_zero_centered=c.norm_zero_centered,
      init_std=c.init_std,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      implementation=c.attention,
      making=Making(bias_init=zeros if c.qkv_bias else None),
      making_out=Making(bias_init=zeros if c.out_bias else None),
    )
    call = attention.Call(
      segments=ctx.segments,
      valid=ctx.valid,
      cache=state,
      cache_length=ctx.cache_length,
      skip_below=ctx.skip_below,
    )
    turns = Turns(ctx.rotation(c, spec))
    if spec.rope is None:
      turns = Turns(growth=ctx.growth)
    return gated_attention(self, layer, (x, x, x), call, turns)

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
