"""Gated softmax attention in JAX and Flax: Y' = Y * sigmoid(X W).

Three ways in: `gated_dot_product_attention` on arrays, the linen module
`GatedAttention`, and the language model `Decoder`. Training starts from
`train.py`; settings are the dataclasses of `gated_jax/config`.
"""

from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder
from gated_jax.model.multi_head import GatedAttention
from gated_jax.model.multi_head import GatedSelfAttention
from gated_jax.ops.attention.api import gated_dot_product_attention
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.gate import GateSpec

__version__ = '0.1.0'
__all__ = [
  'AttentionSpec',
  'Decoder',
  'GateConfig',
  'GateSpec',
  'GatedAttention',
  'GatedSelfAttention',
  'Masking',
  'ModelConfig',
  'RunConfig',
  'gated_dot_product_attention',
  'init_cache',
]
