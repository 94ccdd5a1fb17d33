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
import sys

import jax
import jax.numpy as jnp

from gated_jax.aot.attention_kernels import compiling_for, device_of
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs

device = device_of(sys.argv[1])
place = jax.sharding.SingleDeviceSharding(device)


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


heads = [array(1, 1000, 16, 128)] * 2 + [array(1, 1000, 32, 128)]
rates = [array(1, 1000, 32, dtype=jnp.float32)] * 2
inputs = Inputs(*heads, *rates)
first = array(1, 1000, dtype=bool)


def total(inputs, first):
  return rule.delta_rule(inputs, None, first, 'pallas_tpu').output.sum()


# Plain arrays are differentiated, which compiles for minutes on some targets.
function = jax.grad(total) if sys.argv[2] == 'backward' else total
with compiling_for(device):
  compiled = jax.jit(function).lower(inputs, first).compile()
print('gated_delta_forward' in compiled.as_text())
"""


@pytest.mark.parametrize(
  ('kind', 'part', 'kernel'),
  [
    ('v5e', 'forward', 'True'),
    ('v5p', 'forward', 'True'),
    ('v6e', 'forward', 'True'),
    ('tpu7x', 'forward', 'True'),
    # The gradient needs nothing of the output.
    pytest.param('v5e', 'backward', 'False', marks=pytest.mark.nightly),
  ],
)
def test_it_compiles(kind, part, kernel):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, kind, part],
    env={**os.environ, **QUIET, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == [kernel]
