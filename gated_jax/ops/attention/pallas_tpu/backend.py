"""Flash attention for TPU with the gate inside: own Pallas kernels.

    Y = softmax(scale * Q K^T + mask) V          Y' = Y * act(G)

Queries, keys, values, gate logits and outputs lie as the projections make
them, [B, T, N, H]: a head is a block of H columns of [B, T, N H], so nothing
is transposed around the kernel. Forward's last step multiplies by the gate
and writes Y' and the log-sum-exp, nothing else. Backward's first step makes
the gradients of Y and of G, and delta, from Y' (`vjp.py` has the algebra).

Read `forward.py` and `backward.py` for the kernels, `masks.py` for how the
matrix is cut and what is hidden, `blocks.py` for the sizes of the cuts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from gated_jax.chips import LANES
from gated_jax.ops.attention import vjp
from gated_jax.ops.attention.padding import padded
from gated_jax.ops.attention.padding import round_up
from gated_jax.ops.attention.pallas_tpu.backward import backward
from gated_jax.ops.attention.pallas_tpu.blocks import Blocks
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.blocks import for_device
from gated_jax.ops.attention.pallas_tpu.forward import forward
from gated_jax.ops.attention.pallas_tpu.masks import MaskRule
from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse
from gated_jax.ops.gate import apply_gate

# Document numbers that no caller uses: padding among queries and among keys.
PADDED_QUERY = -(2**31)
PADDED_KEY = PADDED_QUERY + 1

Segments = tuple[Array, Array] | None


def attend(
  inputs: Inputs,
  masking: Masking,
  spec: AttentionSpec,
  *,
  blocks: Blocks | None = None,
  interpret: Any = False,
) -> Result:
  """See gated_jax/ops/attention/spec.py.

  Args:
    inputs: as there.
    masking: as there.
    spec: as there.
    blocks: block sizes; None: those of the device that is compiled for.
    interpret: run without a TPU, slowly; or pltpu.InterpretParams.
  """
  query, _, value, gate_logits = inputs
  b, t, n, h = query.shape
  s, k, v = value.shape[1:]
  refuse(
    'pallas_tpu',
    dropout=spec.dropout > 0,
    an_arbitrary_mask=masking.mask is not None,
    query_offset=masking.query_offset is not None,
    float16=query.dtype == jnp.float16,
    float64=query.dtype == jnp.float64,
    head_dim_above_256=h > 256,
    values_wider_than_256=v > 256,
  )
  queries, keys = padded(t), padded(s)
  segments = _segments(masking, (b, t, s), (queries, keys), spec.causal)
  kernel = KernelSpec(
    queries=queries,
    keys=keys,
    heads=n,
    kv_heads=k,
    head_dim=round_up(h, LANES),
    value_dim=round_up(v, LANES),
    scale=spec.logit_scale(h),
    rule=MaskRule(spec.causal, spec.window, segments is not None),
    granularity='none' if gate_logits is None else _granularity(gate_logits),
    gate=spec.gate,
    blocks=(blocks or for_device()).fit(
      queries, keys, round_up(max(h, v), LANES)
    ),
    interpret=interpret,
  )
  output, lse = _attend(kernel, inputs, segments)
  return Result(output, lse if spec.return_lse else None)


def _granularity(gate_logits: Array) -> str:
  return 'headwise' if gate_logits.shape[-1] == 1 else 'elementwise'


def _segments(
  masking: Masking,
  sizes: tuple[int, int, int],
  lengths: tuple[int, int],
  causal: bool,
) -> Segments:
  """Rows of document numbers [B, 1, T'] and [B, 1, S'], where needed.

  Args:
    masking: has the numbers, if there are any.
    sizes: B, T and S.
    lengths: T' and S', the padded lengths.
    causal: whether causality hides what comes after a query.
  """
  b, t, s = sizes
  # Padded keys lie after all queries, so causality alone can hide them.
  hidden = lengths[1] == s or (causal and t <= s)
  if masking.query_segments is not None and masking.kv_segments is not None:
    ids = (masking.query_segments, masking.kv_segments)
  elif not hidden:
    ids = (jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32))
  else:
    return None
  query_ids, key_ids = (
    jnp.pad(
      numbers.astype(jnp.int32),
      ((0, 0), (0, length - numbers.shape[1])),
      constant_values=padding,
    )[:, None]
    for numbers, length, padding in zip(
      ids, lengths, (PADDED_QUERY, PADDED_KEY), strict=True
    )
  )
  return query_ids, key_ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  spec: KernelSpec, inputs: Inputs, segments: Segments
) -> tuple[Array, Array]:
  return _forward(spec, inputs, segments)[0]


def _forward(
  spec: KernelSpec, inputs: Inputs, segments: Segments
) -> tuple[tuple[Array, Array], Any]:
  query, key, value, gate_logits = inputs
  inside = vjp.saves_gated(gate_logits, spec.gate)
  arrays = {
    'query': pack_heads(query, spec.queries, spec.head_dim),
    'key': pack_heads(key, spec.keys, spec.head_dim),
    'value': pack_heads(value, spec.keys, spec.value_dim),
  }
  if gate_logits is not None and inside:
    arrays['gate_logits'] = pack_gate(gate_logits, spec)
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    packed, lse = forward(spec, arrays, segments)
  saved = unpack_heads(
    checkpoint_name(packed, OUTPUT_NAME), (*query.shape[:3], value.shape[3])
  )
  lse = checkpoint_name(lse[:, :, 0, : query.shape[1]], LSE_NAME)
  gated = saved
  if gate_logits is not None and not inside:
    # Backward needs the ungated output, so that is what is saved, and the gate
    # is an operation of its own which remat can repeat.
    gated = apply_gate(saved, gate_logits, spec.gate)
  return (gated, lse), (inputs, segments, saved, lse)


def _backward(
  spec: KernelSpec, residuals: Any, gradients: tuple[Array, Array]
) -> tuple[Inputs, None]:
  inputs, segments, saved, lse = residuals
  query, key, value, gate_logits = inputs
  d_gated, d_lse = gradients
  arrays = {
    'key': pack_heads(key, spec.keys, spec.head_dim),
    'value': pack_heads(value, spec.keys, spec.value_dim),
    'query': pack_heads(query, spec.queries, spec.head_dim),
    'd_gated': pack_heads(d_gated, spec.queries, spec.value_dim),
    'saved': pack_heads(saved, spec.queries, spec.value_dim),
  }
  if gate_logits is not None:
    arrays['gate_logits'] = pack_gate(gate_logits, spec)
  pad = ((0, 0), (0, 0), (0, spec.queries - lse.shape[2]))
  arrays['lse'] = jnp.pad(lse, pad)[:, :, None]
  arrays['d_lse'] = jnp.pad(d_lse, pad)[:, :, None]
  with jax.enable_x64(False):
    d = backward(spec, arrays, segments)
  d_gate_logits = None
  if gate_logits is not None:
    d_gate_logits = unpack_gate(d['d_gate_logits'], gate_logits)
  d_inputs = Inputs(
    unpack_heads(d['d_query'], query.shape),
    unpack_heads(d['d_key'], key.shape),
    unpack_heads(d['d_value'], value.shape),
    d_gate_logits,
  )
  return d_inputs, None


_attend.defvjp(_forward, _backward)


def pack_heads(x: Array, length: int, width: int) -> Array:
  """[B, T, N, H] to [B, T', N H'], which is a copy only where it is padded."""
  extra = (length - x.shape[1], width - x.shape[3])
  x = jnp.pad(x, ((0, 0), (0, extra[0]), (0, 0), (0, extra[1])))
  return x.reshape(x.shape[0], length, -1)


def unpack_heads(x: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `pack_heads`."""
  b, length, heads, width = shape
  return x.reshape(b, x.shape[1], heads, -1)[:, :length, :, :width]


def pack_gate(gate_logits: Array, spec: KernelSpec) -> Array:
  """Like `pack_heads`; headwise [B, T, N, 1] becomes rows [B, N, 1, T']."""
  if spec.granularity == 'elementwise':
    return pack_heads(gate_logits, spec.queries, spec.value_dim)
  rows = jnp.swapaxes(gate_logits[..., 0], 1, 2)[:, :, None]
  rows = rows.astype(jnp.float32)
  pad = ((0, 0), (0, 0), (0, 0), (0, spec.queries - rows.shape[-1]))
  return jnp.pad(rows, pad)


def unpack_gate(d_gate_logits: Array, gate_logits: Array) -> Array:
  """The inverse of `pack_gate`, in the dtype of the gate's logits."""
  if d_gate_logits.ndim == 3:
    return unpack_heads(d_gate_logits, gate_logits.shape)
  rows = d_gate_logits[:, :, 0, : gate_logits.shape[1]]
  return jnp.swapaxes(rows, 1, 2)[..., None].astype(gate_logits.dtype)
