"""Attention by NVIDIA's cuDNN through JAX, the gate behind it.

cuDNN has causality and a window of its own. It has no segment ids: those, and
any other mask, become a [B, 1, T, S] array of numbers that it adds to the
logits, which costs memory and time that grow with T * S (not with N). Its
log-sum-exp carries no gradient. Backward keeps the ungated output and the
log-sum-exp, under names that remat policies know, and makes the rest again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
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
  output, lse = _gated(spec, (query, key, value), gate, masking)
  return Result(output, lse if spec.return_lse else None)


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
  masking: Masking, queries: int, spec: AttentionSpec
) -> Bool[Array, '#B #N #T'] | None:
  """Queries for which no key is left; None: every one sees some."""
  mask = _mask(masking)
  if mask is None:
    return None
  t = jnp.arange(queries)[:, None]
  s = jnp.arange(mask.shape[3])
  if spec.causal:
    mask = mask & (s <= t)
  if spec.window:
    mask = mask & (t - s < spec.window)
  empty = ~jnp.any(mask, axis=-1)
  return jnp.broadcast_to(empty, (*empty.shape[:2], queries))


def _attend(
  query: Array, key: Array, value: Array, masking: Masking, spec: AttentionSpec
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
  """Output and log-sum-exp as cuDNN gives them, without a gate."""
  # jax.nn has return_residual, but rounds the log-sum-exp to the dtype of the
  # output: an error of 1% and more in the probabilities made from it.
  from jax._src.cudnn import fused_attention_stablehlo as fused

  causal = fused.MaskType.CAUSAL if spec.causal else fused.MaskType.NO_MASK
  output, lse = fused.dot_product_attention(
    query,
    key,
    value,
    mask=_mask(masking),
    scale=spec.logit_scale(query.shape[3]),
    mask_type=causal,
    sliding_window_length=spec.window or None,
    return_residual=True,
  )
  return output, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(spec, inputs, gate, masking):
  return _forward(spec, inputs, gate, masking)[0]


def _forward(spec, inputs, gate, masking):
  query, key, value = inputs
  output, lse = _attend(query, key, value, masking, spec)
  # The gated output is one product away from these, which backward needs.
  output = checkpoint_name(output, OUTPUT_NAME)
  lse = checkpoint_name(lse, LSE_NAME)
  gated, seen_lse = _finish(spec, output, lse, gate, masking)
  return (gated, seen_lse), (inputs, gate, masking, output, lse)


def _finish(spec, output, lse, gate, masking):
  """The gate, and zeros where cuDNN averages over masked logits."""
  empty = _sees_nothing(masking, output.shape[1], spec)
  if empty is not None:
    output = jnp.where(jnp.swapaxes(empty, 1, 2)[..., None], 0, output)
    lse = jnp.where(empty, -jnp.inf, lse)
  if gate is not None:
    output = apply_gate(output, gate, spec.gate)
  return output, lse


def _backward(spec, saved, gradients):
  inputs, gate, masking, output, lse = saved

  def finish(output, gate):
    return _finish(spec, output, lse, gate, masking)[0]

  _, pull = jax.vjp(finish, output, gate)
  d_output, d_gate = pull(gradients[0])
  # What this forward gives is replaced by what was saved, so it never runs.
  found, pull = jax.vjp(
    lambda q, k, v: _attend(q, k, v, masking, spec), *inputs
  )
  saved_for = {
    id(new): old for new, old in zip(found, (output, lse), strict=True)
  }
  pull = jax.tree.map(lambda x: saved_for.pop(id(x), x), pull)
  return pull((d_output, jnp.zeros_like(lse))), d_gate, None


_gated.defvjp(_forward, _backward)
