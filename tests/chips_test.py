"""One row for each device, under every name that JAX has for it."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from gated_jax import chips
from gated_jax.aot.topology import open_topology
from gated_jax.ops.attention.pallas_tpu.blocks import TABLE

# As `jax/_src/pallas/mosaic/tpu_info.py` groups them.
SYNONYMS = [
  ('TPU v5 lite', 'TPU v5e'),
  ('TPU v5', 'TPU v5p'),
  ('TPU v6 lite', 'TPU v6e'),
]


@pytest.mark.parametrize(('one', 'other'), SYNONYMS)
def test_names_of_the_same_device_find_the_same_row(one, other):
  assert chips.find(one) is chips.find(other) is not None
  assert chips.compiler_options(one)
  assert chips.compiler_options(one) == chips.compiler_options(other)


def test_no_name_has_two_rows():
  names = [kind for chip in chips.CHIPS for kind in chip.kinds]
  assert len(names) == len(set(names))
  assert len(chips.TPUS) == sum(isinstance(c, chips.Tpu) for c in chips.CHIPS)


@pytest.mark.parametrize('kind', ['cpu', '', 'TPU v9', 'NVIDIA H200'])
def test_other_devices_have_no_options(kind):
  assert chips.find_tpu(kind) is None
  assert chips.compiler_options(kind) is None


@pytest.mark.parametrize('tpu', chips.TPUS.values(), ids=lambda t: t.name)
def test_the_clock_gives_the_published_peak(tpu):
  # Publishers round to three or four digits.
  assert tpu.matrix_rate == pytest.approx(tpu.peak_flops, rel=3e-3)
  square = 2 * 1024 * 128 * 128
  assert tpu.core.product_cycles(square) == tpu.core.square
  # A unit that is 256 wide is half empty in products of 128.
  full = tpu.cores * square / tpu.flops_per_cycle
  assert tpu.core.square in (full, 2 * full)


@pytest.mark.parametrize('tpu', chips.TPUS.values(), ids=lambda t: t.name)
def test_jax_knows_the_same_cores(tpu):
  versions = {str(v): v for v in pltpu.ChipVersion}
  version = versions[tpu.name.removeprefix('tpu')]
  info = pltpu.get_tpu_info_for_chip(version, tpu.cores)
  assert info.vmem_capacity_bytes == tpu.core.vmem_mib << 20
  assert info.num_mxus == tpu.core.matrix_units
  bandwidth = info.mem_bw_bytes_per_second * tpu.cores
  # JAX has an eighth less for v5p than the maker.
  assert bandwidth == pytest.approx(tpu.bandwidth, rel=0.13)
  rate = info.bf16_ops_per_second * tpu.cores
  assert rate == pytest.approx(tpu.peak_flops, rel=5e-3)
  assert info.hbm_capacity_bytes * tpu.cores > tpu.memory


@pytest.mark.parametrize('tpu', chips.TPUS.values(), ids=lambda t: t.name)
def test_block_sizes_leave_room_in_vector_memory(tpu):
  if tpu.attention_blocks is not None:
    blocks = TABLE[tpu.name]
    assert blocks.vmem_mib + blocks.dq_mib <= tpu.core.vmem_mib


def test_half_a_chip_has_half_of_everything():
  whole = chips.TPUS['v4']
  half = whole.with_cores(1)
  assert (half.memory, half.flops_per_cycle, half.link) == (
    whole.memory / 2,
    whole.flops_per_cycle // 2,
    whole.link / 2,
  )
  assert half.clock == whole.clock
  assert half.matrix_rate == whole.matrix_rate / 2


@pytest.mark.long
@pytest.mark.parametrize('name', chips.TPUS)
def test_the_compiler_takes_its_options(name):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  tpu = chips.TPUS[name]
  devices = open_topology(tpu.topology)
  kind = devices[0].device_kind
  assert chips.find(kind) is tpu
  mesh = jax.sharding.Mesh(devices, 'd')
  rows = jax.sharding.PartitionSpec('d')

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows)
  def exchanged(x):
    """Every collective that a step has."""
    sent = jax.lax.all_to_all(x + 1, 'd', 0, 1, tiled=True)
    whole = jax.lax.all_gather(sent, 'd', tiled=True)
    return jax.lax.psum_scatter(whole + 1, 'd', tiled=True)

  n = 128 * len(devices)
  place = jax.sharding.NamedSharding(mesh, rows)
  x = jax.ShapeDtypeStruct((n * len(devices), n), jnp.float32, sharding=place)
  options = chips.compiler_options(kind)
  run = jax.jit(exchanged, compiler_options=options)
  assert 'all-to-all' in run.lower(x).compile().as_text()
