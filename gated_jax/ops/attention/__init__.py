"""Attention with the gate: one file, one backend, one name."""

from gated_jax.ops.attention.api import gated_dot_product_attention
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking

__all__ = ['AttentionSpec', 'Masking', 'gated_dot_product_attention']
