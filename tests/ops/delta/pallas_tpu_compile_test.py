"""The kernels through the TPU compiler, at the sizes of Qwen3-Next."""

import importlib.util
import os
import subprocess
import sys

import pytest

from gated_jax.aot.topology import QUIET

pytestmark = [
  pytest.mark.long,
  pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='pip install libtpu'
  ),
]
PROGRAM = """
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gated_jax.aot.attention_kernels import compiling_for, device_of
from gated_jax.aot.topology import open_topology
from gated_jax.chips import TPUS
from gated_jax.ops.delta import context
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.filtering import filtered_heads
from gated_jax.ops.delta.gated_norm import gated_norm
from gated_jax.ops.delta.inputs import Inputs

device = device_of(sys.argv[1])
place = jax.sharding.SingleDeviceSharding(device)
if sys.argv[2] == 'parts':
  devices = open_topology(TPUS[sys.argv[1]].topology)[:4]
  mesh = jax.sharding.Mesh(np.array(devices), ('context',))
  spec = jax.sharding.PartitionSpec(None, 'context')
  place = jax.sharding.NamedSharding(mesh, spec)


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


heads = [array(1, 1000, 16, 128)] * 2 + [array(1, 1000, 32, 128)]
rates = [array(1, 1000, 32, dtype=jnp.float32)] * 2
inputs = Inputs(*heads, *rates)
first = array(1, 1000, dtype=bool)


def in_parts(inputs, first):
  # The same over a sequence split over devices.

  def here(*arrays):
    *inputs, first = map(context.as_rows, arrays)
    return context.from_rows(
      context.delta_rule_in_parts(Inputs(*inputs), first, 'context', 'pallas_tpu')
    )

  return jax.shard_map(
    here, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )(*inputs, first)


def around(inputs, first):
  # What stands before and after the rule.
  filters = jnp.ones((4, *inputs.key.shape[2:]), jnp.bfloat16)
  key = filtered_heads(inputs.key, filters, (None, first), 1.0, 'pallas_tpu')
  filters = jnp.ones((4, *inputs.value.shape[2:]), jnp.bfloat16)
  value = filtered_heads(inputs.value, filters, (None, first), 0.0, 'pallas_tpu')
  scale = key[0, 0, 0].astype(jnp.float32)
  return gated_norm(value, inputs.value, scale, 1e-6, 'silu', 'pallas_tpu')


def run(inputs, first, slope):
  def output(inputs):
    if sys.argv[2] == 'around':
      return around(inputs, first).astype(jnp.float32)
    if sys.argv[2] == 'parts':
      return in_parts(inputs, first)
    return rule.delta_rule(inputs, None, first, 'pallas_tpu').output

  if sys.argv[2] == 'forward':
    return output(inputs)
  return jax.vjp(output, inputs)[1](slope)


slope = array(*heads[2].shape, dtype=jnp.float32)
with compiling_for(device):
  compiled = jax.jit(run).lower(inputs, first, slope).compile()
names = re.findall(r'(?:gated_)?delta_[a-z_]*?(?:for|back)ward', compiled.as_text())
print(*sorted(set(names)))
"""


KINDS = ('v5e', 'v5p', 'v6e', 'tpu7x')
FORWARD, BOTH = (
  ['gated_delta_forward'],
  ['gated_delta_backward', 'gated_delta_forward'],
)
# The output of the norm is not read where only gradients are.
AROUND = [
  'delta_filter_backward',
  'delta_filter_forward',
  'delta_norm_backward',
  'delta_unit_filter_backward',
  'delta_unit_filter_forward',
]
# Each takes a minute of a core; these have both kernels.
OFTEN = [('v5e', 'gradients', BOTH), ('v6e', 'gradients', BOTH)]


@pytest.mark.parametrize(
  ('kind', 'part', 'kernels'),
  [
    pytest.param(*case, marks=() if case in OFTEN else pytest.mark.nightly)
    for case in (
      *[(kind, 'forward', FORWARD) for kind in KINDS],
      *[(kind, 'gradients', BOTH) for kind in KINDS],
      *[(kind, 'around', AROUND) for kind in KINDS],
      ('v5p', 'parts', BOTH),
    )
  ],
)
def test_they_compile(kind, part, kernels):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, kind, part],
    env={**os.environ, **QUIET, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == kernels
