"""Small programs compiled for a v5e that is not there, and read back.

What is expected is counted by hand from the program's own shapes.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gated_jax import chips
from gated_jax.aot import hlo
from gated_jax.aot.collectives import Collective
from gated_jax.aot.collectives import device_groups
from gated_jax.aot.collectives import mesh_axes
from gated_jax.aot.predict import collective_seconds
from gated_jax.aot.predict import predict
from gated_jax.aot.program import Program
from gated_jax.aot.topology import chip_of
from gated_jax.aot.topology import open_topology
from gated_jax.ops.moe.exchange import FURTHER_ROUNDS

pytest.importorskip('libtpu')
N = 1024


@functools.cache
def devices():
  return open_topology('v5e:2x2')


def mesh(**sizes):
  count = int(np.prod(list(sizes.values())))
  found = np.array(devices()[:count]).reshape(*sizes.values())
  return jax.sharding.Mesh(found, tuple(sizes))


def compiled(function, where, *arguments):
  """`arguments`: (shape, partition spec)."""
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(where, p))
    for shape, p in arguments
  ]
  return Program(jax.jit(function).lower(*arrays).compile().as_text())


@functools.cache
def scanned():
  """Three matmuls in each of five trips of a loop within seven of another."""

  def inner(x, w):
    return jnp.tanh(x @ w), None

  def outer(x, w):
    return jax.lax.scan(inner, x, jnp.stack([w] * 5))[0] @ w, None

  def whole(x, w):
    return jax.lax.scan(outer, x, jnp.stack([w + i for i in range(7)]))[0]

  return compiled(whole, mesh(x=1), ((N, N), P()), ((N, N), P()))


def test_loops_multiply_flops_and_cycles_by_their_trips():
  program = scanned()
  assert program.flops == 7 * (5 + 1) * 2 * N**3
  assert (7, 1) in {(loop.trips, loop.times) for loop in program.loops}
  assert all(loop.known for loop in program.loops)
  once = sum(
    i.cycles or 0
    for c in program.module.computations.values()
    for i in c.values()
  )
  assert program.cycles > 3 * once
  assert sum(program.cycles_by_kind().values()) == program.cycles
  assert sum(program.cycles_by_phase().values()) == program.cycles


def test_matmuls_take_at_least_the_time_the_matrix_units_need():
  program = scanned()
  chip = chip_of(devices())
  floor = program.flops / chip.flops_per_cycle
  assert floor < program.cycles_by_kind()['matmul'] < 3 * floor


@pytest.mark.parametrize(('scope', 'trips'), [('any', 1), (FURTHER_ROUNDS, 0)])
def test_a_loop_that_depends_on_data_counts_once_and_says_so(scope, trips):
  """But for the rounds of experts that an even load does not need."""

  def run(x, w):
    with jax.named_scope(scope):
      return jax.lax.while_loop(
        lambda x: jnp.sum(x.astype(jnp.float32)) < 1e3, lambda x: x @ w, x
      )

  program = compiled(run, mesh(x=1), ((N, N), P()), ((N, N), P()))
  assert [(loop.known, loop.trips) for loop in program.loops] == [
    (False, trips)
  ]
  assert program.flops == trips * 2 * N**3


def test_of_a_conditional_the_costliest_branch_counts():
  def run(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x + 1, x)

  program = compiled(run, mesh(x=1), ((N, N), P()), ((N, N), P()))
  assert program.flops == 2 * 2 * N**3


@functools.cache
def communicating():
  """Megatron's pair of matmuls, with the second's weights split twice."""
  where = mesh(data=2, tensor=2)

  def run(x, a, b):
    y = jax.nn.silu(x @ a) @ b
    return jax.lax.with_sharding_constraint(y, NamedSharding(where, P('data')))

  return where, compiled(
    run,
    where,
    ((512, N), P('data')),
    ((N, 4 * N), P(None, 'tensor')),
    ((4 * N, N), P('tensor', 'data')),
  )


def found(program, where):
  return {
    (c.kind, mesh_axes(c.groups, dict(where.shape))): c
    for c in program.collectives()
  }


def test_collectives_have_their_kind_axis_and_bytes():
  where, program = communicating()
  cs = found(program, where)
  # Partial sums of y, [512 / 2, N]; the weights, whole along 'data'.
  gather = cs['all-gather', ('data',)]
  assert gather.payload == 2 * (4 * N // 2) * N
  assert gather.wire == gather.payload / 2
  assert gather.size == 2 and gather.times == 1
  sums = cs['all-reduce', ('tensor',)]
  assert sums.payload % (512 // 2 * N * 2) == 0
  assert sums.wire == sums.payload


def test_collectives_of_a_shard_map_loop_count_every_trip():
  where = mesh(x=4)

  def body(x):
    def step(x, _):
      swapped = jax.lax.all_to_all(x, 'x', 0, 0, tiled=True)
      back = jax.lax.all_to_all(swapped * 2, 'x', 0, 0, tiled=True)
      return jax.lax.ppermute(
        back, 'x', [(i, (i + 1) % 4) for i in range(4)]
      ), None

    return jax.lax.scan(step, x, length=6)[0]

  run = jax.shard_map(
    body, mesh=where, in_specs=P('x'), out_specs=P('x'), check_vma=False
  )
  program = compiled(run, where, ((4 * 256, N), P('x')))
  bytes_, calls = {}, {}
  for c in program.collectives():
    assert mesh_axes(c.groups, {'x': 4}) == ('x',)
    calls[c.kind] = calls.get(c.kind, 0) + c.times
    bytes_[c.kind] = c.payload
  assert calls == {'all-to-all': 12, 'collective-permute': 6}
  # 256 rows of N on each device, in bfloat16 or wider while it is scaled.
  assert bytes_['all-to-all'] in (256 * N * 2, 256 * N * 4)


def test_kernels_are_named_counted_and_timed_by_declared_flops():
  def kernel(x, y, o):
    o[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32).astype(
      o.dtype
    )

  def matmul(x, y):
    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((N, N), jnp.bfloat16),
      grid=(N // 256,),
      in_specs=[
        pl.BlockSpec((256, N), lambda i: (i, 0)),
        pl.BlockSpec((N, N), lambda i: (0, 0)),
      ],
      out_specs=pl.BlockSpec((256, N), lambda i: (i, 0)),
      cost_estimate=pl.CostEstimate(
        flops=2 * N**3, bytes_accessed=6 * N * N, transcendentals=0
      ),
      name='rows_of_a_matmul',
    )(x, y)

  def run(x, y):
    return jax.lax.scan(lambda x, _: (matmul(x, y), None), x, length=3)[0]

  where = mesh(x=1)
  program = compiled(run, where, ((N, N), P()), ((N, N), P()))
  (kernel_found,) = program.kernels()
  assert kernel_found.name == 'rows_of_a_matmul'
  assert kernel_found.calls == 3
  assert kernel_found.flops == 2 * N**3
  chip = chip_of(devices())
  bound = predict(program, where, chip)
  assert bound.kernel == pytest.approx(3 * 2 * N**3 / chip.matrix_rate)
  assert bound.kernels[0].bound == 'matrix units'
  known = predict(program, where, chip, lambda kernel: 1e6)
  assert known.kernel == pytest.approx(3e6 / chip.clock)
  assert known.kernels[0].bound == 'schedule'
  # Where its bytes take longer than its products, they are the floor.
  slow = dataclasses.replace(chip, bandwidth=chip.bandwidth / 100)
  bound = predict(program, where, slow)
  assert bound.kernel == pytest.approx(3 * 6 * N**2 / slow.bandwidth)
  assert bound.kernels[0].bound == 'memory'


def test_a_computation_beside_the_main_core_ends_where_it_ends():
  module = hlo.parse("""HloModule m, num_partitions=1
%beside (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}, execution_thread="sparsecore"

%fused (y: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} parameter(0)
}

ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%z), kind=kLoop, calls=%fused
}
""")
  assert set(module.computations) == {'%beside', '%fused', '%main'}
  assert module.root('%beside').name == '%x'


def test_an_attribute_may_go_on_in_lines_that_begin_with_a_bracket():
  text = """HloModule m, num_partitions=1

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %b = bf16[8]{0} copy(%a), frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 8}"
}}, metadata={op_name="x"}, backend_config={"estimated_cycles":"5"}
  ROOT %c = bf16[8]{0} copy(%b), backend_config={"estimated_cycles":"7"}
}
"""
  program = Program(text)
  assert program.cycles == 12
  assert program.visits[1].instruction.op_name == 'x'


SPARSE_CORES = """HloModule m, is_scheduled=true, num_partitions=4

%called (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %r = bf16[1024,1024]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[1024,1024]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %s = ((bf16[1024,1024]{1,0}), bf16[1024,1024]{1,0}, u32[]) call-start(%a), async_execution_thread="sparsecore", to_apply=%called
  %b = bf16[1024,1024]{1,0} negate(%a), backend_config={"estimated_cycles":"BESIDE"}
  %d = bf16[1024,1024]{1,0} call-done(%s)
  ROOT %c = bf16[1024,1024]{1,0} add(%b, %d), backend_config={"estimated_cycles":"1000"}
}
"""


# The same sum between a start and an end that the main core itself issues.
START_AND_DONE = re.sub(
  r'call-start\(%a\).*',
  'all-reduce-start(%a), channel_id=1, replica_groups={{0,1,2,3}}',
  SPARSE_CORES,
).replace('call-done', 'all-reduce-done')


@pytest.mark.parametrize('text', [SPARSE_CORES, START_AND_DONE])
@pytest.mark.parametrize('beside', [0, 10_000, 10**9])
def test_what_has_a_start_and_an_end_is_waited_for_as_it_outlasts_the_rest(
  beside, text
):
  program = Program(text.replace('BESIDE', str(beside)))
  where = mesh(x=4)
  chip = chip_of(devices())
  (c,) = program.collectives()
  assert (c.kind, c.asynchronous, c.payload) == ('all-reduce', True, 2 << 20)
  taken = collective_seconds(c, list(where.devices.flat), chip)
  p = predict(program, where, chip)
  exposed = max(0.0, taken - beside / chip.clock)
  assert p.synchronous == pytest.approx(exposed)
  assert p.synchronous + p.asynchronous == pytest.approx(taken)
  assert p.xla == (beside + 1000) / chip.clock


def test_prediction_is_the_sum_of_its_parts():
  where, program = communicating()
  chip = chip_of(devices())
  p = predict(program, where, chip)
  assert p.xla == program.cycles / chip.clock
  computing = p.xla + p.kernel
  assert p.total == p.synchronous + max(computing, p.asynchronous)
  assert p.synchronous + p.asynchronous > 0
  axes = {t.axes for t in p.traffic}
  assert axes == {('data',), ('tensor',)}


def instruction(attributes, op='all-gather'):
  return hlo.Instruction('%a', 'f32[2]', op, '', (), attributes, False)


@pytest.mark.parametrize(
  'text, groups',
  [
    ('replica_groups={{0,1},{2,3}}', ((0, 1), (2, 3))),
    ('replica_groups=[2,2]<=[4]', ((0, 1), (2, 3))),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
    ("replica_groups=mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['x'=2,'y'=2] {'y'}", ((0, 1), (2, 3))),
    ('replica_groups={}', ((0, 1, 2, 3),)),
  ],
)
def test_every_spelling_of_groups_is_read(text, groups):
  assert device_groups(instruction(text), 4) == groups


def test_axes_are_those_along_which_a_group_moves():
  sizes = {'data': 2, 'fsdp': 1, 'tensor': 2}
  assert mesh_axes(((0, 1), (2, 3)), sizes) == ('tensor',)
  assert mesh_axes(((0, 2), (1, 3)), sizes) == ('data',)
  assert mesh_axes(((0, 1, 2, 3),), sizes) == ('data', 'tensor')


class Device:
  def __init__(self, coords, slice_index=0):
    self.coords, self.slice_index = coords, slice_index


def pod(width, height, slices=1):
  return [
    Device((x, y, 0), s)
    for s in range(slices)
    for x in range(width)
    for y in range(height)
  ]


@pytest.mark.parametrize(
  'kind, size, width, slices, seconds',
  [
    # A line of 8 on v5e: one link, 50 GB/s; a ring of 16 has two.
    ('all-gather', 8, 8, 1, 7 / 8 * 1e9 / 50e9),
    ('all-gather', 16, 16, 1, 15 / 16 * 1e9 / 100e9),
    ('all-reduce', 16, 16, 1, 2 * 15 / 16 * 1e9 / 100e9),
    # Half of what a device has crosses the middle of a ring.
    ('all-to-all', 16, 16, 1, 1e9 * 16 / 4 / 100e9),
    ('collective-permute', 2, 16, 1, 1e9 / 50e9),
    # Two slices of 16: each device brings a sixteenth over 3.125 GB/s.
    (
      'all-reduce',
      32,
      16,
      2,
      2 * 15 / 16 * 1e9 / 100e9 + 2 * 1e9 / 16 / 2 / 3.125e9,
    ),
  ],
)
def test_collectives_take_bytes_over_links(kind, size, width, slices, seconds):
  share = (size - 1) / size
  wire = {'all-reduce': 2e9 * share, 'collective-permute': 1e9}
  c = Collective(
    kind,
    (tuple(range(size)),),
    10**9,
    wire.get(kind, 1e9 * share),
    False,
    1,
    '',
    '',
  )
  chip = chips.TPUS['v5e']
  taken = collective_seconds(c, pod(width, 1, slices), chip)
  assert taken == pytest.approx(seconds)


def test_groups_of_chips_that_are_apart_share_their_links():
  """Every fourth of 16 chips: four such groups go over each link."""
  four = Collective(
    'all-gather', ((0, 4, 8, 12),), 10**9, 0.75e9, False, 1, '', ''
  )
  chip = chips.TPUS['v5e']
  taken = collective_seconds(four, pod(16, 1), chip)
  assert taken == pytest.approx(0.75e9 / (2 * 50e9 / 4))


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e:3x5', 'nonsense'])
def test_unknown_topologies_are_refused_in_one_line(name):
  with pytest.raises(ValueError, match=name) as caught:
    open_topology(name)
  assert '\n' not in str(caught.value)


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    Program('hello')


def test_bytes_of_types():
  assert hlo.bytes_of('(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[5], f32[])') == 19
  assert hlo.bytes_of('token[]') == 0
