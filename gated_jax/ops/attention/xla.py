"""Attention in plain arrays: softmax(scale * Q K^T) V, then the gate.

The definition of correct, for every option, on every device. It holds the
whole [B, N, T, S] matrix in float32, so long sequences want another backend.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.gate import apply_gate


def visible_keys(
  batch: int, queries: int, keys: int, masking: Masking, spec: AttentionSpec
) -> Bool[Array, '#B #N T S'] | None:
  """The 0/1 matrix that all of the rules make together; None: all visible."""
  rules = []
  if spec.causal:
    offset = masking.query_offset
    if offset is None:
      offset = jnp.zeros(1, jnp.int32)
    t = jnp.arange(queries)[:, None] + offset[:, None, None, None]
    s = jnp.arange(keys)
    rules.append(s <= t)
    if spec.window:
      rules.append(t - s < spec.window)
  if masking.query_segments is not None:
    assert masking.kv_segments is not None
    rules.append(
      masking.query_segments[:, None, :, None]
      == masking.kv_segments[:, None, None, :]
    )
  if masking.mask is not None:
    rules.append(masking.mask)
  if not rules:
    return None
  visible = rules[0]
  for rule in rules[1:]:
    visible = visible & rule
  return visible


def attend(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  gate: Float[Array, 'B T N #H'] | None,
  masking: Masking,
  spec: AttentionSpec,
) -> Result:
  """See gated_jax/ops/attention/spec.py."""
  b, t, n, h = query.shape
  s, k = key.shape[1:3]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  # Heads first: a product's rows would come as T, G, and the logits, the
  # largest array here, would be turned, forward and backward.
  grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  logits = jnp.einsum(
    'BKGTH,BSKH->BKGTS', grouped, key, preferred_element_type=wide
  )
  logits = logits.reshape(b, n, t, s) * spec.logit_scale(h)
  visible = visible_keys(b, t, s, masking, spec)
  if visible is not None:
    logits = jnp.where(visible, logits, -jnp.inf)
  # A row without a visible key has -inf for its maximum and its lse.
  top = jnp.max(logits, axis=-1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weights = jnp.exp(logits - top)
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
    'BKGTS,BSKH->BKGTH',
    weights.reshape(b, k, n // k, t, s).astype(value.dtype),
    value,
    preferred_element_type=wide,
  )
  output = output.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
  output = output.astype(query.dtype)
  if gate is not None:
    output = apply_gate(output, gate, spec.gate)
  output = checkpoint_name(output, OUTPUT_NAME)
  if not spec.return_lse:
    return Result(output, None)
  lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
  return Result(output, lse[..., 0])
