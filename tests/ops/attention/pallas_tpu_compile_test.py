"""The TPU kernels through the TPU compiler, forward and backward."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from gated_jax.ops.attention import cases

PROGRAM = """
import sys

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gated_jax import AttentionSpec, Masking, gated_dot_product_attention
from gated_jax.aot.attention_kernels import compiling_for

CASES = [  # T, N, K, H, window, packed, width of the gate (0: none)
  (4096, 16, 8, 128, 0, True, 128),
  (4096, 16, 8, 128, 0, True, 0),
  (4096, 16, 8, 128, 1024, True, 1),
  (2048, 32, 4, 128, 0, True, 128),
  (2048, 8, 2, 64, 0, True, 64),
  (1000, 4, 4, 256, 0, False, 1),
]
WIDE = [(4096, 16, 2, 256, 0, True, 256)]  # Qwen3-Next
topology = topologies.get_topology_desc(
  platform='tpu', topology_name=sys.argv[1]
)
place = jax.sharding.SingleDeviceSharding(topology.devices[0])


def array(shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


# The blocks of a device make larger programs than those of the host.
wide = 'wide' in sys.argv
blocks = compiling_for(topology.devices[0]) if wide else contextlib.nullcontext()
blocks.__enter__()
for t, n, k, h, window, packed, width in WIDE if wide else CASES:
  spec = AttentionSpec(window=window)

  def total(query, key, value, gate, ids):
    y, _ = gated_dot_product_attention(
      query, key, value, gate, masking=Masking(ids, ids), spec=spec,
      implementation='pallas_tpu',
    )
    return y.astype(jnp.float32).sum()

  gate = array((2, t, n, width)) if width else None
  arrays = (
    array((2, t, n, h)), array((2, t, k, h)), array((2, t, k, h)), gate,
    array((2, t), jnp.int32) if packed else None,
  )
  wanted = (0, 1, 2, 3) if width else (0, 1, 2)
  compiled = jax.jit(jax.grad(total, wanted)).lower(*arrays).compile()
  text = compiled.as_text()
  # Nothing of [T, T], and no turned copy of queries around the kernels.
  print(text.count('tpu_custom_call'), f'{t},{t}]' in text)
"""


CASES = """
import sys

import jax

from gated_jax.aot.attention_kernels import compiling_for, device_of, gradients
from gated_jax.ops.attention.cases import CASES
from gated_jax.ops.attention.pallas_tpu.backend import attend
from gated_jax.ops.attention.spec import Inputs

kind, *names = sys.argv[1:]
device = device_of(kind)
place = jax.sharding.SingleDeviceSharding(device)


def placed(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


for name in names or CASES:
  case = CASES[name]
  if case.query_offset or case.dtype == 'float16':
    continue  # refused, with the reason
  arrays = {name: placed(x) for name, x in case.abstract().items()}
  masking = jax.tree.map(placed, jax.eval_shape(case.masking))

  def run(inputs, d_output, masking):
    return gradients(attend, case, masking)(inputs, d_output)

  inputs, d_output = Inputs(**arrays), placed(
    jax.ShapeDtypeStruct(case.output_shape, case.dtype)
  )
  with compiling_for(device):
    jax.jit(run).lower(inputs, d_output, masking).compile()
  print(name, flush=True)
"""

SHARDED = """
import jax
import jax.numpy as jnp
from flax.core import meta

from gated_jax import sharding
from gated_jax.aot.topology import open_topology
from gated_jax.aot.collectives import mesh_axes
from gated_jax.aot.program import Program
from gated_jax.config import GateConfig, MeshConfig
from gated_jax.model.multi_head import GatedAttention

mesh = sharding.make_mesh(
  MeshConfig(data=4, fsdp=1, tensor=4), open_topology('v5e:4x4')
)


def module(kv_heads, granularity, implementation):
  return GatedAttention(
    num_heads=16, num_kv_heads=kv_heads, qkv_features=2048, causal=True,
    gate=GateConfig(granularity=granularity), dtype='bfloat16',
    implementation=implementation, use_bias=False, logical_axes=True,
  )


for kv_heads, granularity in ((8, 'elementwise'), (2, 'headwise')):

  def loss(parameters, x):
    here = module(kv_heads, granularity, 'pallas_tpu')
    y = here.apply({'params': parameters}, x)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  def start(x):
    # No kernel takes part in making parameters.
    return module(kv_heads, granularity, 'xla').init(jax.random.key(0), x)

  with sharding.activate(mesh):
    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8, 1024, 512), 'bfloat16', sharding=rows)
    boxed = jax.eval_shape(start, x)['params']
    parameters = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      meta.unbox(boxed),
      sharding.shardings(mesh, boxed),
    )
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = Program(step.lower(parameters, x).compile().as_text())
  print('mesh', sum(k.calls for k in program.kernels()))
  for c in program.collectives():
    axes = ','.join(mesh_axes(c.groups, dict(mesh.shape)))
    print(axes, c.kind, c.shape.replace(' ', ''))
"""


def run(program, *arguments, timeout=280):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  done = subprocess.run(
    [sys.executable, '-c', program, *arguments],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'PYTHONPATH': os.pathsep.join(sys.path),
    },
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('kind', ('v5e', 'v5p', 'v6e'))
def test_every_named_case_compiles(kind):
  lines = run(CASES, kind, timeout=3500)
  assert len(lines) >= len(cases.CASES) - 3


@pytest.mark.long
def test_on_a_mesh_only_projections_and_shared_heads_need_the_others():
  lines = run(SHARDED)
  starts = [i for i, line in enumerate(lines) if line[0] == 'mesh']
  assert len(starts) == 2
  # Forward and backward of attention, on every device its own rows and heads.
  assert [lines[i][1] for i in starts] == ['2', '2']
  for kv_heads, found in (
    (8, lines[1 : starts[1]]),
    (2, lines[starts[1] + 1 :]),
  ):
    whole = []  # of what has the width of x
    for axis, kind, shapes in found:
      arrays = re.findall(r'\w+\[([\d,]*)\]', shapes)
      if axis == 'data':  # gradients of weights, and the loss
        assert kind == 'all-reduce'
        assert all(not a or a.split(',')[0] != '2' for a in arrays)
        continue
      if axis == 'data,tensor':
        assert shapes == 'f32[]'  # the loss, of tokens that are split
        continue
      assert axis == 'tensor'
      for array in arrays:
        if array == '2,1024,512':
          whole.append(kind)
        else:
          # Keys and values, where there are fewer of them than devices: each
          # device has those of its queries, and their gradients are summed.
          assert kv_heads == 2
          assert re.fullmatch(r'2,1024,[12],128', array), array
    # Devices with the same rows share their tokens around the layer: what
    # `out` sums is cut, and its gradient gathered. That of x is a sum.
    forward, gradient, *sums = whole
    assert (forward, gradient) == ('reduce-scatter', 'all-gather')
    assert 1 <= len(sums) <= 2 and {*sums} <= {'all-reduce', 'reduce-scatter'}


@pytest.mark.long
@pytest.mark.parametrize(
  'topology',
  (
    'v5e:2x2',
    # The units of v5e, and more of them.
    pytest.param('v5p:2x2x1', marks=pytest.mark.nightly),
    pytest.param('v6e:2x2', marks=pytest.mark.nightly),
  ),
)
def test_both_passes_compile_for_every_shape_of_call(topology):
  lines = run(PROGRAM, topology)
  assert len(lines) == 6, lines
  assert all(int(count) >= 2 for count, _ in lines), lines
  assert all(square == 'False' for _, square in lines), lines


@pytest.mark.nightly
@pytest.mark.parametrize(
  'topology', ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
)
def test_wide_heads_of_large_groups_fit_into_the_memory_of_a_core(topology):
  ((count, _),) = run(PROGRAM, topology, 'wide')
  assert int(count) >= 2
