"""The TPU kernels through the TPU compiler, forward and backward."""

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

from gated_jax import AttentionSpec, Masking, gated_dot_product_attention

CASES = [  # T, N, K, H, window, packed, width of the gate (0: none)
  (4096, 16, 8, 128, 0, True, 128),
  (4096, 16, 8, 128, 0, True, 0),
  (4096, 16, 8, 128, 1024, True, 1),
  (2048, 32, 4, 128, 0, True, 128),
  (2048, 8, 2, 64, 0, True, 64),
  (1000, 4, 4, 256, 0, False, 1),
]
topology = topologies.get_topology_desc(
  platform='tpu', topology_name=sys.argv[1]
)
place = jax.sharding.SingleDeviceSharding(topology.devices[0])


def array(shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


for t, n, k, h, window, packed, width in CASES:
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


@pytest.mark.parametrize('topology', ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'))
def test_both_passes_compile_for_every_shape_of_call(topology):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, topology],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'PYTHONPATH': os.pathsep.join(sys.path),
    },
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [line.split() for line in done.stdout.splitlines()]
  assert len(lines) == 6, done.stdout
  assert all(int(count) >= 2 for count, _ in lines), lines
  assert all(square == 'False' for _, square in lines), lines
