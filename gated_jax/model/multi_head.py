"""Gated attention for other people's models.

`GatedAttention` takes the place of `nn.MultiHeadDotProductAttention`: the same
field and parameter names, arguments and masks. Decoders use
`mixers/attention.py`, which computes both.
"""

from typing import Any

from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.config import GateConfig
from gated_jax.model.mixers import attend
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.model.mixers.attention import gated_attention


class GatedAttention(nn.Module):
  """Multi-head attention whose heads a gate scales.

  Parameters: {query, key, value, out}/kernel as in Flax's own module, without
  biases, and gate/kernel (see `gated_jax/model/gate.py`).
  """

  num_heads: int
  num_kv_heads: int = 0  # 0: num_heads; fewer: each serves a group of heads
  qkv_features: int = 0  # all query heads together; 0: width of the input
  out_features: int = 0  # 0: width of the input
  gate: GateConfig = GateConfig()
  causal: bool = False
  window: int = 0  # keys a query sees, itself included; 0: all
  dropout_rate: float = 0.0  # of attention weights
  deterministic: bool | None = None
  qk_norm: bool = False  # RMSNorm of each query's and key's head
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  implementation: str = 'auto'

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, 'B T D'],
    inputs_k: Float[Array, 'B S E'] | None = None,
    inputs_v: Float[Array, 'B S E2'] | None = None,
    *,
    mask: Bool[Array, '#B #N #T S'] | None = None,
    deterministic: bool | None = None,
  ) -> Float[Array, 'B T M']:
    """Attends, gates, projects.

    Args:
      inputs_q: what queries, and gates on queries and outputs, are made of.
      inputs_k: what keys are made of; None: inputs_q (self-attention).
      inputs_v: what values are made of; None: inputs_k.
      mask: True where a query sees a key; dimensions of 1 repeat.
      deterministic: no dropout; here or as the module's field.

    Returns:
      [B, T, out_features].
    """
    inputs_k = inputs_q if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    layer = self._layer(inputs_q.shape[-1], deterministic)
    call = attend.Call(mask=mask, out_features=self.out_features)
    inputs = inputs_q, inputs_k, inputs_v
    return gated_attention(self, layer, inputs, call)[0]

  def _layer(self, width: int, deterministic: bool | None) -> AttentionLayer:
    heads = self.num_heads
    kv_heads = self.num_kv_heads or heads
    features = self.qkv_features or width
    if heads % kv_heads:
      raise ValueError(
        f'num_heads={heads} must be a multiple of num_kv_heads={kv_heads}'
      )
    if features % heads:
      raise ValueError(
        f'qkv_features={features} must be a multiple of num_heads={heads}'
      )
    dropout = self.dropout_rate
    if dropout and nn.merge_param(
      'deterministic', self.deterministic, deterministic
    ):
      dropout = 0.0
    return AttentionLayer(
      heads=heads,
      kv_heads=kv_heads,
      head_dim=features // heads,
      gate=self.gate,
      causal=self.causal,
      window=self.window,
      dropout=dropout,
      qk_norm=self.qk_norm,
      norm_eps=self.norm_eps,
      norm_zero_centered=self.norm_zero_centered,
      init_std=self.init_std,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      implementation=self.implementation,
    )
