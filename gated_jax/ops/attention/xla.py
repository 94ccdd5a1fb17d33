"""Attention in plain arrays: softmax(scale * Q K^T) V, then the gate.

The definition of correct, for every option, on every device. It holds the
whole [B, N, T, S] matrix in float32, so long sequences want another backend.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gated_jax.ops.attention.masks import visible_keys
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.gate import apply_gate


def attend(inputs: Inputs, masking: Masking, spec: AttentionSpec) -> Result:
  """See gated_jax/ops/attention/spec.py."""
  query, key, value, gate_logits = inputs
  b, t, n, h = query.shape
  s, k, v = value.shape[1:]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  # Heads first: otherwise the product has rows of T, G, and the attention
  # logits, the largest array here, are transposed forward and backward.
  grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  attention_logits = jnp.einsum(
    'BKGTH,BSKH->BKGTS', grouped, key, preferred_element_type=wide
  )
  attention_logits = attention_logits.reshape(b, n, t, s) * spec.logit_scale(h)
  visible = visible_keys(t, s, masking, spec)
  if visible is not None:
    attention_logits = jnp.where(visible, attention_logits, -jnp.inf)
  # A row without a visible key has -inf for its maximum and its lse.
  top = jnp.max(attention_logits, axis=-1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weights = jnp.exp(attention_logits - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  weights = weights / total
  if spec.dropout:
    keep = jax.random.bernoulli(
      masking.dropout_key, 1 - spec.dropout, weights.shape
    )
    weights = jnp.where(keep, weights / (1 - spec.dropout), 0.0)
  output = jnp.einsum(
    'BKGTS,BSKV->BKGTV',
    weights.reshape(b, k, n // k, t, s).astype(value.dtype),
    value,
    preferred_element_type=wide,
  )
  output = output.transpose(0, 3, 1, 2, 4).reshape(b, t, n, v)
  output = output.astype(query.dtype)
  if gate_logits is not None:
    output = apply_gate(output, gate_logits, spec.gate)
  output = checkpoint_name(output, OUTPUT_NAME)
  if not spec.return_lse:
    return Result(output, None)
  lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
  return Result(output, lse[..., 0])
