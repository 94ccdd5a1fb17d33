"""Attention by NVIDIA's cuDNN through JAX, the gate behind it.

cuDNN has causality and a window of its own. It has no segment ids: those, and
any other mask, become a [B, 1, T, S] array of numbers that it adds to the
logits, which costs memory and time that grow with T * S (not with N). Its
log-sum-exp carries no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse
from gated_jax.ops.gate import apply_gate


def attend(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  gate: Float[Array, 'B T N #H'] | None,
  masking: Masking,
  spec: AttentionSpec,
) -> Result:
  """See gated_jax/ops/attention/spec.py."""
  t, h = query.shape[1], query.shape[3]
  s = key.shape[1]
  masked = masking.query_segments is not None or masking.mask is not None
  platform = jax.default_backend()
  refuse(
    'cudnn',
    **{
      f'it needs an NVIDIA GPU and this is a {platform}': platform != 'gpu',
      f'dtype {query.dtype}, only bfloat16 and float16': query.dtype
      not in (jnp.bfloat16, jnp.float16),
      f'head_dim {h}, only multiples of 8 up to 256': h % 8 != 0 or h > 256,
      f'head_dim {h} above 128 on a GPU older than Hopper': h > 128
      and not _is_hopper(),
      f'masks over odd lengths {t} and {s}': masked and (t % 2 or s % 2) != 0,
      'causality between different lengths': spec.causal and t != s,
      'query_offset': masking.query_offset is not None,
      'dropout': spec.dropout > 0,
    },
  )
  mask = _mask(masking)
  if spec.return_lse:
    output, lse = _with_lse(query, key, value, mask, spec)
  else:
    output, lse = _without_lse(query, key, value, mask, spec), None
  if mask is not None:
    # Where all logits are masked cuDNN averages over them.
    empty = _sees_nothing(mask, t, spec)
    output = jnp.where(jnp.swapaxes(empty, 1, 2)[..., None], 0, output)
    if lse is not None:
      lse = jnp.where(empty, -jnp.inf, lse)
  if gate is not None:
    output = apply_gate(output, gate, spec.gate)
  return Result(output, lse)


def _is_hopper() -> bool:
  """Whether this GPU has compute capability 9.0 or more."""
  capability = getattr(jax.local_devices()[0], 'compute_capability', '0')
  return float(capability) >= 9


def _mask(masking: Masking) -> Bool[Array, '#B #N T S'] | None:
  """What cuDNN does not do by itself, as one array; True is visible."""
  mask = masking.mask
  if masking.query_segments is None:
    return mask
  assert masking.kv_segments is not None
  same = (
    masking.query_segments[:, None, :, None]
    == masking.kv_segments[:, None, None, :]
  )
  return same if mask is None else same & mask


def _sees_nothing(
  mask: Bool[Array, '#B #N #T S'], queries: int, spec: AttentionSpec
) -> Bool[Array, '#B #N T']:
  """Queries for which no key is left."""
  t = jnp.arange(queries)[:, None]
  s = jnp.arange(mask.shape[3])
  if spec.causal:
    mask = mask & (s <= t)
  if spec.window:
    mask = mask & (t - s < spec.window)
  empty = ~jnp.any(mask, axis=-1)
  return jnp.broadcast_to(empty, (*empty.shape[:2], queries))


def _without_lse(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  spec: AttentionSpec,
) -> Float[Array, 'B T N H']:
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=spec.logit_scale(query.shape[3]),
    is_causal=spec.causal,
    local_window_size=(spec.window - 1, 0) if spec.window else None,
    implementation='cudnn',
  )


def _with_lse(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  spec: AttentionSpec,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
  # jax.nn has return_residual, but rounds the log-sum-exp to the dtype of the
  # output: an error of 1% and more in the probabilities made from it.
  from jax._src.cudnn import fused_attention_stablehlo as fused

  causal = fused.MaskType.CAUSAL if spec.causal else fused.MaskType.NO_MASK
  output, lse = fused.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=spec.logit_scale(query.shape[3]),
    mask_type=causal,
    sliding_window_length=spec.window or None,
    return_residual=True,
  )
  return output, jax.lax.stop_gradient(lse.astype(jnp.float32))
