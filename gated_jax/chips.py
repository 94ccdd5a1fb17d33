"""The one table of devices: what each is called, and what it can do.

JAX calls the same device by several names ("TPU v6 lite" and "TPU v6e"), so a
row has all of them. Whatever depends on the kind of device asks this table:
the compiler's options, utilisation, block sizes of kernels, and all that
`gated_jax/aot` computes about pods.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

GIB = 1 << 30
# Lanes of a vector register: the last axis of an array is tiled by so many
# elements on every TPU.
LANES = 128
# The share of a TPU's vector memory that XLA may fill with the operands of one
# fusion. A larger share gives matmuls larger tiles, so that they read their
# operands less often and become bound by the matrix units.
TILES = 'xla_tpu_scoped_vmem_limit_kib'
# Weights come by all-gathers, beside computing, where the compiler would make
# one all-reduce of zero-padded shards of a layer, which nothing overlaps.
ASYNC_GATHERS = 'xla_tpu_prefer_async_allgather_to_allreduce'
# 'false': arrays of 16 bits lie in tiles of 8 rows for kernels too. By default
# tpu7x gives kernels tiles of 16 and all else tiles of 8, so that what lies
# between is copied, a layer's part of a stack with the whole stack.
TILES_OF_16_ROWS = 'xla_tpu_control_large_2nd_minor_layout_for_x16'
# Lets the rows of experts travel beside computing. On tpu7x they do so anyway;
# for v5e the compiler refuses to build a program that would.
ASYNC_EXCHANGE = 'xla_tpu_enable_async_all_to_all'
# Weights are gathered and gradients summed by a TPU's sparse cores while the
# others compute, as on tpu7x by default. MaxText sets these for its runs on v5p
# and v6e (docs/tpu.md).
SPARSE_CORES = {
  ASYNC_GATHERS: 'true',
  'xla_tpu_use_tc_device_shape_on_sc': 'true',
  'xla_sc_disable_megacore_partitioning': 'true',
  'xla_tpu_enable_sparse_core_reduce_scatter_v2': 'true',
  **{
    f'xla_tpu_enable_sparse_core_collective_offload_{collective}': 'true'
    for collective in (
      'all_gather',
      '2d_all_gather',
      '3d_all_gather',
      'all_reduce',
      'reduce_scatter',
    )
  },
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX sees it. Figures are per device, which may be half a chip.

  `peak_flops` is the dense bfloat16 rate that the maker publishes, per second.
  """

  name: str
  kinds: tuple[str, ...]  # every `device_kind` it reports; the usual one first
  peak_flops: float


@dataclasses.dataclass(frozen=True)
class TensorCore:
  """Facts about one core of a TPU that the compiler's schedule lacks."""

  vmem_mib: int
  matrix_units: int
  narrow: int  # cycles of a matrix instruction on 16 rows of 16 bits
  wide: int  # cycles of a matrix instruction on 8 rows of 32 bits
  # Cycles of a product of 1024 x 128 and 128 x 128 with every unit busy. Units
  # that are 256 wide are half empty at this width.
  square: float

  def product_cycles(self, flops: float) -> float:
    """Cycles that so many FLOPs of such products keep the units busy."""
    return flops / (2 * 1024 * 128 * 128) * self.square


@dataclasses.dataclass(frozen=True, eq=False)
class Tpu(Chip):
  """A TPU, with what is needed to compile for one that is not there.

  Clocks follow from the published peak and the size of the matrix units: v5e
  has four of 128 x 128, which make 131,072 FLOPs per cycle, and 197 TFLOP/s.
  """

  topology: str  # the smallest slice that the compiler knows
  memory: float  # bytes that the compiler lets a program use
  bandwidth: float  # bytes per second of that memory, as published
  clock: float  # cycles per second
  flops_per_cycle: int  # bfloat16, on the matrix units
  link: float  # bytes per second over one link in one direction
  ring: int  # a slice this long closes to a ring in that direction
  network: float  # bytes per second to another slice
  cores: int  # tensor cores of one device
  core: TensorCore
  # True: sparse cores gather weights and sum gradients beside computing.
  sparse_cores: bool = False
  # Options for the compiler when it compiles a model's programs.
  compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Block sizes in which this device differs from the defaults of
  # `gated_jax/ops/attention/pallas_tpu/blocks.py`; None: kernels were never
  # scheduled for it.
  attention_blocks: Mapping[str, Any] | None = None

  @property
  def matrix_rate(self) -> float:
    """FLOPs per second by the clock; published peaks are rounded."""
    return self.clock * self.flops_per_cycle

  @property
  def bytes_per_cycle(self) -> float:
    """Bytes that its memory reads or writes in a cycle."""
    return self.bandwidth / self.clock

  def with_cores(self, cores: int) -> 'Tpu':
    """This device where JAX presents only so many of its cores as one."""
    if cores == self.cores:
      return self
    share = cores / self.cores
    return dataclasses.replace(
      self,
      peak_flops=self.peak_flops * share,
      memory=self.memory * share,
      flops_per_cycle=int(self.flops_per_cycle * share),
      bandwidth=self.bandwidth * share,
      link=self.link * share,
      network=self.network * share,
      cores=cores,
    )


def _core_with_units_of_128(vmem_mib: int) -> TensorCore:
  return TensorCore(vmem_mib, matrix_units=4, narrow=16, wide=8, square=256.0)


def _core_with_units_of_256(vmem_mib: int) -> TensorCore:
  return TensorCore(vmem_mib, matrix_units=2, narrow=8, wide=4, square=128.0)


# Names: `jax/_src/pallas/mosaic/tpu_info.py`, which also has the vector memory.
# Memory: the compiler's own message when a program is too large ("exceeds
# available HBM"), libtpu 0.0.42.1. Peaks, links and networks:
# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (system
# architecture). They give the bandwidth of all links of a chip, both directions
# together: v5e 400 GB/s over 4, v6e 800 over 4, v4 600, v5p and tpu7x 1200 over
# 6. Rings close on v5e and v6e at 16 and on the cubes of the others at 4.
# A device is a chip, except on tpu7x: there it is one of a chip's two cores and
# gets half of the chip's links and network. A v4 chip is one device when it
# runs, and two in a topology to compile for (`Tpu.with_cores`).
# docs/tpu.md has the reasons for the compiler's options.
_TPUS = (
  Tpu(
    'v4',
    ('TPU v4',),
    275e12,
    topology='v4:2x2x1',
    memory=30.5 * GIB,
    bandwidth=1228e9,
    clock=1.05e9,
    flops_per_cycle=262_144,
    link=50e9,
    ring=4,
    network=6.25e9,
    cores=2,
    core=_core_with_units_of_128(16),
  ),
  Tpu(
    'v5e',
    ('TPU v5 lite', 'TPU v5e'),
    197e12,
    topology='v5e:2x2',
    memory=15.75 * GIB,
    bandwidth=819e9,
    clock=1.5e9,
    flops_per_cycle=131_072,
    link=50e9,
    ring=16,
    network=3.125e9,
    cores=1,
    core=_core_with_units_of_128(128),
    compiler_options={
      TILES: '40960',
      ASYNC_GATHERS: 'true',
    },
    attention_blocks={'strip': 128, 'dq_mib': 32.0},
  ),
  Tpu(
    'v5p',
    ('TPU v5', 'TPU v5p'),
    459e12,
    topology='v5p:2x2x1',
    memory=95.74 * GIB,
    bandwidth=2765e9,
    clock=1.75e9,
    flops_per_cycle=262_144,
    link=100e9,
    ring=4,
    network=6.25e9,
    cores=2,
    core=_core_with_units_of_128(64),
    sparse_cores=True,
    compiler_options={
      TILES: '32768',
      ASYNC_EXCHANGE: 'true',
      **SPARSE_CORES,
    },
    attention_blocks={},
  ),
  Tpu(
    'v6e',
    ('TPU v6 lite', 'TPU v6e'),
    918e12,
    topology='v6e:2x2',
    memory=31.25 * GIB,
    bandwidth=1640e9,
    clock=1.75e9,
    flops_per_cycle=524_288,
    link=100e9,
    ring=16,
    network=12.5e9,
    cores=1,
    core=_core_with_units_of_256(128),
    sparse_cores=True,
    compiler_options={
      TILES: '65536',
      ASYNC_EXCHANGE: 'true',
      **SPARSE_CORES,
    },
    attention_blocks={'dq_mib': 32.0},
  ),
  Tpu(
    'tpu7x',
    ('TPU7x', 'TPU v7x'),
    1153.5e12,
    topology='tpu7x:2x2x1',
    memory=94.75 * GIB,
    bandwidth=3690e9,
    clock=2.2e9,
    flops_per_cycle=524_288,
    link=50e9,
    ring=4,
    network=6.25e9,
    cores=1,
    core=_core_with_units_of_256(64),
    sparse_cores=True,
    compiler_options={
      TILES: '49152',
      ASYNC_GATHERS: 'true',
      TILES_OF_16_ROWS: 'false',
    },
    attention_blocks={'back_strip': 128},
  ),
)
_GPUS = (
  Chip('A100', ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB'), 312e12),
  Chip('H100', ('NVIDIA H100 80GB HBM3',), 989e12),
  Chip('H200', ('NVIDIA H200',), 989e12),
)
TPUS: Mapping[str, Tpu] = {tpu.name: tpu for tpu in _TPUS}
CHIPS: tuple[Chip, ...] = (*_TPUS, *_GPUS)


def find(kind: str) -> Chip | None:
  """The row of the device that calls itself so; None: there is none."""
  return next((chip for chip in CHIPS if kind in chip.kinds), None)


def find_tpu(kind: str) -> Tpu | None:
  """The row of this kind of TPU; None: there is none, or it is no TPU."""
  chip = find(kind)
  return chip if isinstance(chip, Tpu) else None


def compiler_options(kind: str) -> dict[str, str] | None:
  """Options for `jax.jit` on devices of this kind; None: it has none."""
  tpu = find_tpu(kind)
  return dict(tpu.compiler_options) or None if tpu else None
