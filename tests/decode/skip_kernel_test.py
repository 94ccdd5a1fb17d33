"""Heads left unread: the decoder's step through the TPU kernel."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.decode import for_decoding
from gated_jax.decode import generate
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder
from gated_jax.ops.attention import decode

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

BASE = ModelConfig(
  vocab=64,
  length=96,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=24,
  dtype='float32',
  init_std=0.3,
  scan=False,
)
# Of the scores: some heads are below it in every case, and some are not.
CASES = {
  'headwise': (GateConfig(granularity='headwise', init_std=0.5), 0.6),
  'elementwise': (GateConfig(init_std=0.5), 0.9),
  'shared': (GateConfig(shared=True, init_std=0.5), 0.75),
  'parameter': (
    GateConfig(granularity='headwise', source='parameter', init_std=1.0),
    0.95,
  ),
}


@functools.cache
def built(config):
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  rng = np.random.default_rng(2)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    std = config.gate.init_std if 'gate' in name.split("'") else 0.3
    return rng.normal('scale' in name, std, leaf.shape).astype(leaf.dtype)

  shapes = meta.unbox(shapes['params'])
  return jax.tree_util.tree_map_with_path(draw, shapes)


def steps(config, params, threshold, tokens):
  """Logits of each token in turn, from an empty cache."""
  model = Decoder(config)

  @jax.jit
  def call(params, tokens, cache):
    return model.apply(
      {'params': params}, tokens, cache=cache, skip_below=threshold
    )

  cache, found = init_cache(config, len(tokens), 32), []
  for t in range(tokens.shape[1]):
    logits, cache = call(params, tokens[:, t : t + 1], cache)
    found.append(logits[:, 0])
  return np.stack(found, 1)


OFTEN = ('headwise', 'elementwise')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.nightly)
    for name in CASES
  ],
)
def test_the_kernel_takes_the_steps_of_a_decoder(name):
  gate, threshold = CASES[name]
  config = dataclasses.replace(
    BASE, gate=gate, pattern=('attention:nope', 'attention:window=5')
  )
  params, threshold = built(config), jnp.float32(threshold)
  tokens = np.random.default_rng(0).integers(0, 64, (3, 8), np.int32)
  exact = steps(config, params, None, tokens)
  dropped = steps(config, params, threshold, tokens)
  paged = dataclasses.replace(config, attention='pallas_tpu')
  with pltpu.force_tpu_interpret_mode():
    read = steps(paged, params, threshold, tokens)
  assert np.abs(dropped - exact).max() > 1e-3
  np.testing.assert_allclose(read, dropped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'tensor', [4, pytest.param(2, marks=pytest.mark.nightly)]
)
def test_it_runs_on_each_devices_heads(tensor):
  gate, threshold = CASES['headwise']
  config = dataclasses.replace(BASE, gate=gate, attention='pallas_tpu')
  params, threshold = built(config), jnp.float32(threshold)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 3), np.int32)
  plain = dataclasses.replace(config, attention='xla')
  expected = steps(plain, params, threshold, tokens)
  mesh = sharding.make_mesh(
    MeshConfig(fsdp=2, tensor=tensor), jax.devices()[: 2 * tensor]
  )
  boxed = jax.eval_shape(
    Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  with sharding.activate(mesh), pltpu.force_tpu_interpret_mode():
    placed = jax.device_put(params, sharding.shardings(mesh, boxed))
    found = steps(config, placed, threshold, tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('width', 'kernels'), [(128, 1), (8, 0)])
def test_generate_takes_it_on_a_tpu(width, kernels, monkeypatch):
  gate, threshold = CASES['headwise']
  config = dataclasses.replace(BASE, gate=gate, head_dim=width, depth=1)
  config, params = for_decoding(config, built(config))
  call = functools.partial(
    generate,
    params=params,
    prompts=[[1, 2, 3], [4]],
    max_tokens=6,
    skip_below=threshold,
  )
  expected = np.stack(list(call(Decoder(config))))
  # Another length is another model: what was compiled is not used again.
  config = dataclasses.replace(config, length=95)
  seen = []
  read_pages = decode.read_pages
  monkeypatch.setattr(
    decode,
    'read_pages',
    lambda *a, **k: seen.append(a[0].shape) or read_pages(*a, **k),
  )
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  with pltpu.force_tpu_interpret_mode():
    found = np.stack(list(call(Decoder(config))))
  assert seen == [(2, 4, width)] * kernels
  np.testing.assert_array_equal(found, expected)


PROGRAM = """
import re
import sys

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.experimental import topologies

from gated_jax.config import GateConfig, ModelConfig
from gated_jax.decode.generate import _step
from gated_jax.decode.sampling import Sampling
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder

topology = topologies.get_topology_desc(
  platform='tpu', topology_name=sys.argv[1]
)
place = jax.sharding.SingleDeviceSharding(topology.devices[0])


def on_tpu(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )


config = ModelConfig(
  vocab=1024, width=512, depth=2, heads=8, kv_heads=4, head_dim=128,
  mlp_width=512, pattern=('attention', 'attention:window=1024'), scan=False, param_dtype='bfloat16',
  attention='pallas_tpu', gate=GateConfig(granularity='headwise'),
)
model = Decoder(config)
tokens = jax.ShapeDtypeStruct((8,), jnp.int32)
boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
cache = jax.eval_shape(lambda: init_cache(config, 8, 2560))
one = jax.ShapeDtypeStruct((), jnp.uint32)
arrays = meta.unbox(boxed['params']), cache, tokens, one, one
threshold = jax.ShapeDtypeStruct((), jnp.float32)
compiled = _step.lower(
  model, *on_tpu((*arrays, threshold)), sampling=Sampling()
).compile()
text = compiled.as_text()
room = '2560,128]'
copies = [
  line for line in text.splitlines()
  if re.search(r'(copy|transpose)\\(', line) and room in line.split('(')[0]
]
print(text.count('custom_call_target="tpu_custom_call"'), len(copies))
"""


@pytest.mark.parametrize(
  'topology',
  [
    'v5e:2x2',
    *(
      pytest.param(name, marks=pytest.mark.nightly)
      for name in ('v5p:2x2x1', 'v6e:2x2')
    ),
  ],
)
def test_a_step_compiles_for_a_tpu_and_turns_no_cache(topology):
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
  assert done.stdout.split() == ['2', '0']
