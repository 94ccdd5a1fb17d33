"""The logit of a head's sink, which has no value; `gated_jax/ops/sink.py`."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import parameter
from gated_jax.ops.sink import key_bias_logits


class SinkLogits(nn.Module):
  """Owns a number for each head, or a key for each kv head; zeros at first."""

  kind: str  # 'sink_logit' or 'key_bias'
  kv_heads: int
  param_dtype: Any = 'float32'
  boxed: bool = True

  @nn.compact
  def __call__(self, query: Float[Array, 'B T N H']) -> Float[Array, '#B N #T']:
    """The logits that these queries, normed and rotated, meet."""
    of_key = self.kind == 'key_bias'
    heads, channels = query.shape[2:]
    name = 'key' if of_key else 'logit'
    shape = (self.kv_heads, channels) if of_key else (heads,)
    axes = ('kv_heads', 'head_dim') if of_key else ('heads',)
    value = parameter(
      self,
      name,
      shape,
      axes if self.boxed else None,
      Kind.BIAS,
      init=nn.initializers.zeros,
      dtype=self.param_dtype,
    )
    if of_key:
      return key_bias_logits(query, value.astype(query.dtype))
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))[
      None, :, None
    ]
