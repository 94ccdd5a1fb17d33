"""Other TPU attention kernels, to compare ours with by the same compiler.

JAX's splash and tokamax's, both without a gate, in the block sizes that their
authors and a search over schedules favour. tokamax is no dependency:
`pip install tokamax` beside `jax[tpu]`, or its rows say that it is missing.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as jax_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as jax_mask,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """Square blocks of queries and keys, and how many keys are taken at once."""

  block: int
  compute: int
  diagonal: int = 0  # tokamax: pieces that a diagonal block is cut into


def _both(
  make: Callable, heads: int, length: int, options: Options
) -> Callable:
  """(q, k, v [B, N, T, H], gradient of the output) to three gradients."""

  def run(q: Any, k: Any, v: Any, d_output: Any) -> Any:
    """Forward and backward of the peer's kernel, a batch at a time."""
    kernel = make(heads, length, options)
    return jax.vjp(jax.vmap(kernel), q, k, v)[1](d_output)

  return run


def _jax_splash(heads: int, length: int, options: Options) -> Any:
  block = min(options.block, length)
  mask = jax_mask.CausalMask((length, length))
  return jax_kernel.make_splash_mha(
    jax_mask.MultiHeadMask([mask] * heads),
    block_sizes=jax_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=min(options.compute, block),
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,
    q_seq_shards=1,
  )


def _tokamax_splash(heads: int, length: int, options: Options) -> Any:
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_kernel,
  )
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    splash_attention_mask,
  )

  del heads
  block = min(options.block, length)
  config = splash_attention_kernel.SplashConfig(
    block_q=block,
    block_kv=block,
    block_kv_compute=block if options.diagonal else options.compute,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
  )
  if options.diagonal:
    config = dataclasses.replace(
      config,
      qk_diag_skip=True,
      sv_diag_skip=True,
      qk_diag_grid=options.diagonal,
    )
  return splash_attention_kernel.make_splash_mha(
    splash_attention_mask.CausalMask((length, length)),
    config=config,
    q_seq_shards=1,
  )


@dataclasses.dataclass(frozen=True)
class Peer:
  """A library's kernel, and the options that are tried."""

  make: Callable
  options: tuple[Options, ...]
  package: str

  @property
  def installed(self) -> bool:
    """True where it can be compared with."""
    return importlib.util.find_spec(self.package) is not None

  def both(self, heads: int, length: int, options: Options) -> Callable:
    """Forward and backward as one function of arrays [B, N, T, H]."""
    return _both(self.make, heads, length, options)


PEERS = {
  'splash (JAX)': Peer(
    _jax_splash, (Options(1024, 512), Options(512, 512)), 'jax'
  ),
  'splash (tokamax)': Peer(
    _tokamax_splash,
    (Options(1024, 1024, 4), Options(512, 512, 2), Options(1024, 512)),
    'tokamax',
  ),
}
