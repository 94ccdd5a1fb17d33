"""What the TPU compiler says about splash."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from gated_jax.ops.attention import gated_dot_product_attention
from gated_jax.ops.attention.cases import CASES
from gated_jax.ops.attention.spec import Inputs, Masking

case = CASES[sys.argv[1]]
device = topologies.get_topology_desc(
  platform='tpu', topology_name='v5e:2x2'
).devices[0]
place = jax.sharding.SingleDeviceSharding(device)
abstract = {
  n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  for n, x in case.abstract().items()
}
ids = jax.ShapeDtypeStruct((case.B, case.T), jnp.int32, sharding=place)

def loss(arrays, ids):
  masking = Masking() if case.segments == 'none' else Masking(ids, ids)
  output, lse = gated_dot_product_attention(
    *Inputs(**arrays), masking=masking, spec=case.spec, implementation='splash')
  return jnp.sum(output.astype(jnp.float32)) + jnp.sum(lse)

compiled = jax.jit(jax.grad(loss)).lower(abstract, ids).compile()
print('kernels', compiled.as_text().count('tpu_custom_call'))
print('MiB', compiled.memory_analysis().temp_size_in_bytes >> 20)
"""


@pytest.mark.parametrize(
  'case_name, kernels, mib',
  [
    pytest.param('dense_1b7_packed', 2, 1024, marks=pytest.mark.long),
    pytest.param('moe_15b_packed', 2, 1024, marks=pytest.mark.nightly),
    pytest.param('dense_1b7_window', 2, 1024, marks=pytest.mark.nightly),
    # Forward, and a kernel each for dQ and for dK with dV.
    pytest.param('dense_1b7_32k', 3, 1024, marks=pytest.mark.nightly),
    pytest.param('dense_1b7_128k', 3, 4096, marks=pytest.mark.nightly),
  ],
)
def test_real_shapes_compile_for_tpu_without_a_matrix_of_weights(
  case_name, kernels, mib
):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'PYTHONPATH': os.pathsep.join(sys.path),
  }
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, case_name],
    env=environment,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = dict(line.split() for line in done.stdout.splitlines())
  assert int(found['kernels']) == kernels
  assert int(found['MiB']) < mib
