"""Attention by JAX's own TPU kernel (splash), with the gate around it.

Splash wants [N, T, H] and lengths that its blocks divide, so this file
transposes and pads its arrays, and undoes both. The gate and its backward are
in `vjp.py`. Kernels that have the gate inside and read [B, T, N H] as it lies
in memory are in `pallas_tpu/`; splash stays as the fallback that JAX
maintains.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask,
)
from jaxtyping import Array

from gated_jax.ops.attention import vjp
from gated_jax.ops.attention.padding import padded
from gated_jax.ops.attention.padding import padding_block
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse

# Blocks are as large as `padding_block` allows, up to 1024, and forward takes
# so many keys of a block at a time: the best of the compiler's schedules at
# T 4096 and head_dim 128 on v5e, v5p and v6e. Splash's default of 128 costs
# five times as much.
KEYS_AT_A_TIME = 512
# The fused backward writes one dQ for each block of keys, and they are summed
# afterwards. Above this many blocks two kernels need less memory.
FUSED_BLOCKS = 8
# Segment number of padding, which no document has.
PADDING = -(2**31)


def attend(
  inputs: Inputs,
  masking: Masking,
  spec: AttentionSpec,
  *,
  interpret: bool = False,
) -> Result:
  """See gated_jax/ops/attention/spec.py. `interpret` runs it without a TPU."""
  query, key = inputs.query, inputs.key
  refuse(
    'splash',
    dropout=spec.dropout > 0,
    an_arbitrary_mask=masking.mask is not None,
    query_offset=masking.query_offset is not None,
    float16=query.dtype == jnp.float16,
    float64=query.dtype == jnp.float64,
  )
  kernel = Splash(
    queries=query.shape[1],
    keys=key.shape[1],
    heads=query.shape[2],
    window=spec.window,
    causal=spec.causal,
    scale=spec.logit_scale(query.shape[3]),
    interpret=interpret,
  )
  return vjp.attend(kernel, inputs, masking, spec)


@dataclasses.dataclass(frozen=True)
class Splash:
  """Splash without a gate, forward and backward, on unpadded arrays."""

  queries: int
  keys: int
  heads: int
  window: int
  causal: bool
  scale: float
  interpret: bool

  def forward(
    self, query: Array, key: Array, value: Array, masking: Masking
  ) -> tuple[Array, Array]:
    """See vjp.Kernel."""
    q, k, v = self._prepare(query, key, value)
    segments = self._segments(q, masking)
    with jax.enable_x64(False):  # a kernel's integers have 32 bits
      kernel = self._make()
      output, (lse,) = jax.vmap(kernel)(q, k, v, segments)
    # Splash gives a row that sees nothing the mean of all values, or 0 / 0.
    lse = lse[:, :, : self.queries]
    empty = ~(lse > kernel.kwargs['mask_value'] / 2)
    output = jnp.where(empty[..., None], 0, output[:, :, : self.queries])
    return jnp.swapaxes(output, 1, 2), jnp.where(empty, -jnp.inf, lse)

  def backward(
    self,
    inputs: tuple[Array, Array, Array],
    masking: Masking,
    d_output: Array,
    lse: Array,
    delta: Array,
  ) -> tuple[Array, Array, Array]:
    """See vjp.Kernel."""
    q, k, v = self._prepare(*inputs)
    dy = _heads_first(d_output.astype(q.dtype), q.shape[2])
    # Makes exp(attention_logits - lse) zero in rows that see nothing, and in
    # padding.
    lse = jnp.where(jnp.isneginf(lse), 1e30, lse)
    extra = ((0, 0), (0, 0), (0, q.shape[2] - self.queries))
    lse = jnp.pad(lse, extra, constant_values=1e30)
    delta = jnp.pad(delta, extra)
    segments = self._segments(q, masking)
    with jax.enable_x64(False):
      one_row = functools.partial(self._one_row, self._make())
      dq, dk, dv = jax.vmap(one_row)((q, k, v), segments, (lse, dy, delta))
    dq, dk, dv = (
      jnp.swapaxes(d[:, :, : x.shape[1]], 1, 2)
      for d, x in zip((dq, dk, dv), inputs, strict=True)
    )
    return (dq * self.scale).astype(dq.dtype), dk, dv

  def _one_row(
    self,
    kernel: Any,
    inputs: tuple[Array, Array, Array],
    segments: splash_attention_kernel.SegmentIds | None,
    rows: tuple[Array, Array, Array],
  ) -> tuple[Array, Array, Array]:
    """The backward of splash itself, which takes delta as it is given.

    Args:
      kernel: made for these lengths.
      inputs: query, key and value of one row of the batch.
      segments: its document numbers.
      rows: its log-sum-exp, gradient of the output, and delta.
    """
    sizes = kernel.kwargs['block_sizes']
    options = {
      'is_mqa': False,
      'mask_value': kernel.kwargs['mask_value'],
      'attn_logits_soft_cap': None,
      'q_layout': sizes.q_layout,
      'k_layout': sizes.k_layout,
      'v_layout': sizes.v_layout,
      'mask_function': kernel.kwargs['mask_function'],
      'interpret': self.interpret,
    }
    arrays = (*inputs, segments, None, *rows)
    dq, dk, dv = splash_attention_kernel._splash_attention_bwd_dkv(
      *arrays,
      bq=sizes.block_q_dkv,
      bkv=sizes.block_kv_dkv,
      bkv_compute=sizes.block_kv_dkv_compute,
      mask_info=kernel.dkv_mask_info,
      use_fused_bwd_kernel=sizes.use_fused_bwd_kernel,
      **options,
    )
    if not sizes.use_fused_bwd_kernel:
      dq = splash_attention_kernel._splash_attention_bwd_dq(
        *arrays,
        bq=sizes.block_q_dq,
        bkv=sizes.block_kv_dq,
        mask_info=kernel.dq_mask_info,
        **options,
      )
    return dq, dk, dv

  def _make(self) -> Any:
    """The kernel for these lengths, padded to whole blocks."""
    bq, bkv = padding_block(self.queries), padding_block(self.keys)
    shape = (padded(self.queries), padded(self.keys))
    mask: splash_attention_mask.Mask
    if self.window:
      mask = splash_attention_mask.LocalMask(shape, (self.window - 1, 0), 0)
    elif self.causal:
      mask = splash_attention_mask.CausalMask(shape)
    else:
      mask = splash_attention_mask.FullMask(shape)
    fused = shape[1] // bkv <= FUSED_BLOCKS
    sizes = splash_attention_kernel.BlockSizes(
      block_q=bq,
      block_kv=bkv,
      block_kv_compute=min(bkv, KEYS_AT_A_TIME),
      block_q_dkv=bq,
      block_kv_dkv=bkv,
      block_kv_dkv_compute=bkv,
      block_q_dq=None if fused else bq,
      block_kv_dq=None if fused else bkv,
      use_fused_bwd_kernel=fused,
    )
    return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * self.heads),
      block_sizes=sizes,
      save_residuals=True,
      head_shards=1,
      q_seq_shards=1,
      interpret=self.interpret,
    )

  def _prepare(
    self, query: Array, key: Array, value: Array
  ) -> tuple[Array, Array, Array]:
    """Heads before positions, whole blocks, the scale inside the query."""
    query = (query * self.scale).astype(query.dtype)
    return (
      _heads_first(query, padded(self.queries)),
      _heads_first(key, padded(self.keys)),
      _heads_first(value, padded(self.keys)),
    )

  def _segments(
    self, q: Array, masking: Masking
  ) -> splash_attention_kernel.SegmentIds | None:
    """Document numbers of the padded rows, where anything needs them."""
    pad_q = q.shape[2] - self.queries
    pad_kv = padded(self.keys) - self.keys
    # Padded keys lie after all queries, so causality alone can hide them.
    hidden = self.causal and self.queries <= self.keys
    batch = q.shape[0]
    if masking.query_segments is not None:
      assert masking.kv_segments is not None
      ids = (masking.query_segments, masking.kv_segments)
    elif pad_kv and not hidden:
      ids = (
        jnp.zeros((batch, self.queries), jnp.int32),
        jnp.zeros((batch, self.keys), jnp.int32),
      )
    else:
      return None
    return splash_attention_kernel.SegmentIds(
      *(
        jnp.pad(i.astype(jnp.int32), ((0, 0), (0, p)), constant_values=PADDING)
        for i, p in zip(ids, (pad_q, pad_kv), strict=True)
      )
    )


def _heads_first(x: Array, length: int) -> Array:
  """[B, T, N, H] to [B, N, length, H]."""
  x = jnp.swapaxes(x, 1, 2)
  return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
