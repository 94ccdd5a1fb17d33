"""Counting what kernels do, and reading how long the compiler says it takes."""

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gated_jax import chips
from gated_jax.aot import attention
from gated_jax.aot import attention_kernels
from gated_jax.aot import counts
from gated_jax.aot import peers
from gated_jax.aot import schedule
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.pallas_tpu import backend as pallas_tpu
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking

CORE = chips.TPUS['v5e'].core


def _triangle(table, x, y):
  """On and below the diagonal of a 4 x 4 grid: a branch, a loop, a table."""
  i, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def start():
    y[...] = jnp.zeros_like(y)

  @pl.when(j <= i)
  def product():
    y[...] += jnp.dot(x[...], x[...])

  def more(_, carry):
    y[...] += 1.0
    return carry

  jax.lax.fori_loop(0, table[i], more, 0)


def triangle(x):
  spec = pl.BlockSpec((128, 128), lambda i, j, _: (0, 0))
  return pl.pallas_call(
    _triangle,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(4, 4), in_specs=[spec], out_specs=spec
    ),
    out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32),
    name='triangle',
  )(jnp.asarray([0, 3, 0, 2], jnp.int32), x)


def test_branches_and_loops_are_counted_over_the_whole_grid():
  (kernel,) = counts.kernels(triangle, jnp.zeros((128, 128)))
  assert (kernel.name, kernel.grid) == ('triangle', (4, 4))
  found = [(p.loop, p.flops, p.runs) for p in kernel.body.walk() if p.work]
  assert found == [
    (False, 0, 16),
    (False, 0, 4),
    (False, 2 * 128**3, 10),
    (True, 0, 4 * (0 + 3 + 0 + 2)),
  ]


def test_rows_that_vmap_adds_are_counted_and_not_seen_by_the_kernel():
  (kernel,) = counts.kernels(jax.vmap(triangle), jnp.zeros((3, 128, 128)))
  found = [p.runs for p in kernel.body.walk() if p.work]
  assert found == [48, 12, 30, 60]


def total_flops(function, shapes):
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
  return [
    sum(p.flops * p.runs for p in kernel.body.walk())
    for kernel in counts.kernels(function, *arrays)
  ]


def blocks(n):
  """Share of an n x n grid of blocks that causality leaves."""
  return (n + 1) / (2 * n)


@pytest.mark.parametrize('length', (1024, 8192))
def test_attention_kernels_do_the_causal_half_and_a_known_rest(length):
  case = Case(B=1, T=length, N=2, K=1, H=128, dtype='bfloat16')
  ours = attention_kernels.Ours(attention_kernels.TABLE['v6e'])
  square = 2 * 2 * length * length * 128  # of one product, two heads
  # Diagonals are cut into strips of 256.
  mine = total_flops(*ours(case))
  assert mine == pytest.approx(
    [n * square * blocks(length / 256) for n in (2, 5)]
  )
  # Splash computes whole blocks.
  peer = peers.PEERS['splash (JAX)']
  theirs = total_flops(*attention_kernels.Theirs(peer, peer.options[0])(case))
  assert theirs == pytest.approx(
    [n * square * blocks(length / 1024) for n in (2, 5)]
  )


# As libtpu writes it: a prologue, the grid's loop with a branch and a loop
# in it, and what ends them. Products of 16 rows take 16 cycles of 4 units.
PROGRAM = [
  '     0   :  { %s0 = sst }',
  '   0x1 LB: > { %s1 = sadd }',
  '   0x2   : > { %1 = sbr.rel (%p1) target = $region3 }',
  *['   0x3   : > { %s1 = sadd }'] * 4,
  *['   0x7   : > { %v1 = vst }'] * 150,
  '  0x9d PF: > { %s1 = sadd }',
  '  0x9e   : > { %1 = sbr.rel (%p1) target = $region4 }',
  *['  0x9f   : > { %s1 = sadd }'] * 4,
  *['  0xa3   : > { %v2 = vmatmul.bf16.gmra.mxu0 %v1 }'] * 32,
  '  0xc3 PF: > { %s1 = sadd }',
  '  0xc4 LB: >> { %s1 = sadd }',
  '  0xc5   : >> { %v3 = vadd }',
  '  0xc6 PF: > { %s1 = sadd }',
]


def test_a_schedule_is_cut_where_the_program_jumps(tmp_path):
  (tmp_path / '1-triangle.2-03-final_bundles.txt').write_text(
    '\n'.join(PROGRAM)
  )
  (path,) = schedule.find(tmp_path, 'triangle')
  found = [
    (s.kind, s.depth, s.bundles, s.products) for s in schedule.read(path, CORE)
  ]
  assert found == [
    ('rest', 0, 1, 0),
    ('rest', 1, 6, 0),
    ('branch', 1, 150, 0),
    ('rest', 1, 6, 0),
    ('branch', 1, 32, 128),
    ('rest', 1, 1, 0),
    ('loop', 2, 2, 0),
    ('rest', 1, 1, 0),
  ]


def test_cycles_are_stretches_times_their_parts_counts():
  stretches = [
    schedule.Stretch('rest', 0, 10),
    schedule.Stretch('rest', 1, 20),
    schedule.Stretch('branch', 1, 300),
    schedule.Stretch(
      'branch', 1, 30, products=CORE.product_cycles(2 * 128**3) * 8
    ),
    schedule.Stretch('rest', 1, 5),
    schedule.Stretch('loop', 2, 7),
    schedule.Stretch('rest', 1, 3),
  ]
  (kernel,) = counts.kernels(triangle, jnp.zeros((128, 128)))
  product = next(p for p in kernel.body.walk() if p.flops)
  product.flops *= 8
  found = schedule.estimate(stretches, kernel, CORE)
  by_hand = 10 + 16 * (20 + 5 + 3) + 4 * 300 + 10 * 256 + 20 * 7
  assert found.cycles == by_hand
  assert found.most is stretches[3]
  stretches[3].products *= 3
  with pytest.raises(ValueError, match='cycles of matrix products'):
    schedule.estimate(stretches, kernel, CORE)


def test_longer_rows_of_a_peer_follow_from_shorter_ones():
  def cycles(length):
    n = length / 1024
    return 7 + 30 * n + 400 * n * (n + 1) / 2

  lengths = (8192, 16_384, 32_768)
  found = attention_kernels.extrapolate(
    lengths, [cycles(n) for n in lengths], 131_072
  )
  assert found == pytest.approx(cycles(131_072))


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_bench_compares_with_peers_end_to_end():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  command = [sys.executable, '-m', 'gated_jax.aot.attention']
  done = subprocess.run(
    [*command, '--target=v6e', '--lengths=1024', '--gates=headwise'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  last = done.stdout.splitlines()[-1].split()
  assert last[:2] == ['pallas_tpu', 'headwise']
  assert float(last[6]) < 1


def test_steps_between_documents_are_left_out_of_packed_rows():
  case = Case(B=1, T=8192, N=2, K=1, H=128, dtype='bfloat16')
  attend = functools.partial(
    pallas_tpu.attend, blocks=attention_kernels.TABLE['v6e']
  )

  def flops(documents):
    ids = jnp.asarray(np.repeat(np.arange(documents), case.T // documents))[
      None
    ]
    both = attention_kernels.gradients(attend, case, Masking(ids, ids))
    inputs = Inputs(**case.abstract())
    return [
      sum(p.flops * p.runs for p in kernel.body.walk())
      for kernel in counts.kernels(both, inputs, inputs.query)
    ]

  whole, packed = flops(1), flops(4)
  # Of documents as long as a block of queries, only diagonals are left.
  square = 2 * 2 * 2048 * 2048 * 128
  assert packed == pytest.approx([n * 4 * square * blocks(8) for n in (2, 5)])
  assert whole == pytest.approx([n * 16 * square * blocks(32) for n in (2, 5)])


@pytest.mark.parametrize(
  'flag', ['--gates=none,twice', '--lengths=4k', '--lengths=0']
)
def test_the_bench_names_a_flag_that_means_nothing(flag, capsys):
  assert attention.main([flag]) == 2
  assert flag.split(',')[-1].split('=')[-1] in capsys.readouterr().err
