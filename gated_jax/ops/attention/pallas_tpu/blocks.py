"""Block sizes of the TPU kernels, and all that a kernel is compiled for."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl

from gated_jax import chips
from gated_jax.chips import LANES
from gated_jax.ops.attention.pallas_tpu.masks import MaskRule
from gated_jax.ops.gate import GateSpec


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Numbers of queries and keys that the kernels take at a time."""

  # Forward holds a block of queries and walks over keys. The diagonal is cut
  # into strips.
  queries: int = 2048
  keys: int = 512
  strip: int = 256
  resident: int = 4096  # keys and values that lie in VMEM
  # Backward holds a block of keys and walks over queries.
  back_queries: int = 512
  back_keys: int = 2048
  back_strip: int = 256
  back_resident: int = 4096  # queries, and keys, that lie in VMEM
  back_resident_wide: int = 2048  # most of them where heads exceed 128 channels
  # VMEM that a kernel may use, and how much of it dQ may take in float32.
  vmem_mib: int = 48
  dq_mib: float = 16.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if 'mib' in field.name:
        if value <= 0:
          raise ValueError(f'{field.name}={value} must be positive')
      elif value < LANES or value & (value - 1):
        raise ValueError(
          f'{field.name}={value} must be a power of two, at least {LANES}'
        )
    for small, large in (
      ('keys', 'resident'),
      ('strip', 'keys'),
      ('back_strip', 'back_queries'),
      ('back_queries', 'back_keys'),
      ('back_keys', 'back_resident'),
    ):
      if getattr(self, small) > getattr(self, large):
        raise ValueError(f'{small} must not exceed {large} in {self}')

  def fit(self, queries: int, keys: int, width: int = LANES) -> 'Blocks':
    """These sizes, reduced so that they divide the padded lengths.

    Args:
      queries, keys: their padded lengths.
      width: of heads, with their padding.
    """
    resident = self.back_resident
    if width > LANES:
      resident = min(resident, self.back_resident_wide)
    q, k = queries & -queries, keys & -keys
    chunk = min(self.keys, q, k)
    back_keys = min(self.back_keys, resident, k)
    back_queries = min(self.back_queries, back_keys, q)
    return dataclasses.replace(
      self,
      queries=min(self.queries, q),
      keys=chunk,
      strip=min(self.strip, chunk),
      back_queries=back_queries,
      back_keys=back_keys,
      back_resident=resident,
      back_strip=min(self.back_strip, back_queries),
    )


# Block sizes by the name of a TPU, chosen by the compiler's schedules
# (docs/kernels.md).
TABLE: dict[str, Blocks] = {
  name: Blocks(**tpu.attention_blocks)
  for name, tpu in chips.TPUS.items()
  if tpu.attention_blocks is not None
}
# Smaller blocks for a host that interprets the kernels.
HOST = Blocks(queries=1024, back_keys=1024, back_resident=1024)


def for_device() -> Blocks:
  """Block sizes for the device that is compiled for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device else ''
  if not kind and jax.default_backend() == 'tpu':
    kind = jax.devices()[0].device_kind
  tpu = chips.find_tpu(kind)
  if tpu is not None and tpu.name in TABLE:
    return TABLE[tpu.name]
  if kind.startswith('TPU'):
    raise NotImplementedError(
      f'pallas_tpu attention cannot do this: no block sizes for {kind}'
    )
  return HOST


def resident_part(length: int, unit: int, limit: int) -> int:
  """Largest multiple of `unit` that divides length and is within limit."""
  parts = range(unit, min(length, limit) + 1, unit)
  return max((p for p in parts if length % p == 0), default=unit)


@dataclasses.dataclass(frozen=True)
class KernelSpec:
  """All that a kernel is compiled for. Lengths and widths are padded."""

  queries: int
  keys: int
  heads: int
  kv_heads: int
  head_dim: int  # width of queries and keys
  value_dim: int  # width of values, outputs and an elementwise gate
  scale: float
  rule: MaskRule
  granularity: str  # 'none', 'elementwise' or 'headwise'
  gate: GateSpec
  blocks: Blocks  # reduced to fit the lengths
  interpret: Any

  @property
  def group(self) -> int:
    """Query heads for each kv head."""
    return self.heads // self.kv_heads

  def cost(
    self, products: tuple[int, int], queries: range, arrays: list[Any]
  ) -> pl.CostEstimate:
    """XLA's cost estimate of a call.

    Only pairs that causality and the window leave are counted, not those that
    whole blocks compute beside them.

    Args:
      products: how many matrix products of [T, S] the call makes over, or of,
        the width of keys, and of values.
      queries: positions of the queries that take part.
      arrays: all that it reads and writes.
    """
    last = np.asarray(queries) + 1
    seen = (
      np.minimum(last, self.keys) if self.rule.causal else self.keys + 0 * last
    )
    if self.rule.window:
      seen = np.clip(self.keys - last + self.rule.window, 0, None)
      seen = np.minimum(np.minimum(last, self.rule.window), seen)
    pairs = int(seen.sum()) * self.heads * arrays[0].shape[0]
    width = products[0] * self.head_dim + products[1] * self.value_dim
    return pl.CostEstimate(
      flops=2 * width * pairs,
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
