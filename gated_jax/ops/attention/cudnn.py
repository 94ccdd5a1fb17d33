"""Attention by NVIDIA's cuDNN through JAX, with the gate applied after it.

cuDNN has causality and a window of its own. It has no segment ids: those, and
any other mask, become a [B, 1, T, S] array of numbers that it adds to the
attention logits, which costs memory and time that grow with T * S (not with
N). Backward keeps the ungated output and the log-sum-exp, under names that
remat policies know, and computes the rest again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention import masks
from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse
from gated_jax.ops.gate import apply_gate


def attend(inputs: Inputs, masking: Masking, spec: AttentionSpec) -> Result:
  """See gated_jax/ops/attention/spec.py."""
  query, _, value, _ = inputs
  t, h = query.shape[1], query.shape[3]
  s, v = value.shape[1], value.shape[3]
  masked = masking.query_segments is not None or masking.mask is not None
  platform = jax.default_backend()
  refuse(
    'cudnn',
    **{
      f'it needs an NVIDIA GPU and this is a {platform}': platform != 'gpu',
      f'dtype {query.dtype}, only bfloat16 and float16': query.dtype
      not in (jnp.bfloat16, jnp.float16),
      f'head_dim {h}, only multiples of 8 up to 256': h % 8 != 0 or h > 256,
      f'values of width {v}, only multiples of 8 up to 256': v % 8 != 0
      or v > 256,
      f'head_dim {h} above 128 on a GPU older than Hopper': h > 128
      and not _is_hopper(),
      f'values of width {v} beside head_dim {h}, which need Hopper and '
      'cuDNN 9.10': v != h and not _takes_other_values(),
      f'masks over odd lengths {t} and {s}': masked and (t % 2 or s % 2) != 0,
      'causality between different lengths': spec.causal and t != s,
      'query_offset': masking.query_offset is not None,
      'dropout': spec.dropout > 0,
    },
  )
  output, lse = _gated(spec, inputs, masking)
  return Result(output, lse if spec.return_lse else None)


def _is_hopper() -> bool:
  """True where this GPU has compute capability 9.0 or more."""
  capability = getattr(jax.local_devices()[0], 'compute_capability', '0')
  return float(capability) >= 9


def _takes_other_values() -> bool:
  """True where values may have another width than keys."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  return _is_hopper() and fused.check_cudnn_version() >= 91_000


def _sees_nothing(
  masking: Masking, queries: int, spec: AttentionSpec
) -> Bool[Array, '#B #N #T'] | None:
  """Queries for which no key is left; None: every one sees some."""
  given = masks.given_keys(masking)
  if not given:
    return None
  keys = given[0].shape[3]
  visible = masks.all_of(
    [*given, *masks.causal_keys(queries, keys, masking, spec)]
  )
  assert visible is not None
  empty = ~jnp.any(visible, axis=-1)
  return jnp.broadcast_to(empty, (*empty.shape[:2], queries))


def _attend(
  query: Array, key: Array, value: Array, masking: Masking, spec: AttentionSpec
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N T']]:
  """Output and log-sum-exp as cuDNN gives them, without a gate."""
  # jax.nn has return_residual, but rounds the log-sum-exp to the dtype of the
  # output: an error of 1% and more in the probabilities made from it.
  from jax._src.cudnn import fused_attention_stablehlo as fused

  causal = fused.MaskType.CAUSAL if spec.causal else fused.MaskType.NO_MASK
  output, lse = fused.dot_product_attention(
    query,
    key,
    value,
    mask=masks.all_of(masks.given_keys(masking)),
    scale=spec.logit_scale(query.shape[3]),
    mask_type=causal,
    sliding_window_length=spec.window or None,
    return_residual=True,
  )
  return output, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(
  spec: AttentionSpec, inputs: Inputs, masking: Masking
) -> tuple[Array, Array]:
  return _forward(spec, inputs, masking)[0]


def _forward(
  spec: AttentionSpec, inputs: Inputs, masking: Masking
) -> tuple[tuple[Array, Array], Any]:
  query, key, value, gate_logits = inputs
  output, lse = _attend(query, key, value, masking, spec)
  # The gated output is one product away from these, which backward needs.
  output = checkpoint_name(output, OUTPUT_NAME)
  lse = checkpoint_name(lse, LSE_NAME)
  results = _finish(spec, output, lse, gate_logits, masking)
  return results, (inputs, masking, output, lse)


def _finish(
  spec: AttentionSpec,
  output: Array,
  lse: Array,
  gate_logits: Array | None,
  masking: Masking,
) -> tuple[Array, Array]:
  """The gate, and zeros where cuDNN averages over masked logits."""
  empty = _sees_nothing(masking, output.shape[1], spec)
  if empty is not None:
    output = jnp.where(jnp.swapaxes(empty, 1, 2)[..., None], 0, output)
    lse = jnp.where(empty, -jnp.inf, lse)
  if gate_logits is not None:
    output = apply_gate(output, gate_logits, spec.gate)
  return output, lse


def _backward(
  spec: AttentionSpec, saved: Any, gradients: tuple[Array, Array]
) -> tuple[Inputs, None]:
  inputs, masking, output, lse = saved
  query, key, value, gate_logits = inputs

  def finish(output: Array, gate_logits: Array | None) -> Array:
    """The gate, outside of cuDNN's kernel."""
    return _finish(spec, output, lse, gate_logits, masking)[0]

  _, pull = jax.vjp(finish, output, gate_logits)
  d_output, d_gate_logits = pull(gradients[0])
  seen = _for_gradient_of_lse(output, d_output, gradients[1])
  # The residuals of a forward that is traced here are replaced by those that
  # were saved, so this forward never runs.
  results, pull = jax.vjp(
    lambda q, k, v: _attend(q, k, v, masking, spec), query, key, value
  )
  replacements = {
    id(new): old for new, old in zip(results, (seen, lse), strict=True)
  }
  pull = jax.tree.map(lambda x: replacements.pop(id(x), x), pull)
  d_query, d_key, d_value = pull((d_output, jnp.zeros_like(lse)))
  return Inputs(d_query, d_key, d_value, d_gate_logits), None


def _for_gradient_of_lse(
  output: Float[Array, 'B T N V'],
  d_output: Float[Array, 'B T N V'],
  d_lse: Float[Array, 'B N T'],
) -> Float[Array, 'B T N V']:
  """An output from which cuDNN also makes what follows from d_lse.

  Its backward reads the output for rowsum(dY * Y) alone, from which d_lse has
  to be taken away (`vjp.py`). A row without a gradient of its output passes
  none of the log-sum-exp's on.
  """
  # One channel takes all of it, so that one number is rounded and no more.
  largest = jnp.argmax(jnp.abs(d_output), axis=-1, keepdims=True)
  chosen = jnp.arange(d_output.shape[-1]) == largest
  chosen &= d_output != 0
  gradient = jnp.where(chosen, d_output.astype(jnp.float32), 1.0)
  part = jnp.swapaxes(d_lse, 1, 2)[..., None] / gradient
  changed = (output.astype(jnp.float32) - part).astype(output.dtype)
  return jnp.where(chosen, changed, output)


_gated.defvjp(_forward, _backward)
