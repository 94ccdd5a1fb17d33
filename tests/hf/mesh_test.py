"""A folder on a mesh of eight devices is the model that it is on one.

Read straight onto the mesh: loss and all gradients of packed rows. The tensor
axis is wider than the kv heads, and a row's documents end inside of the parts
that the context axis makes of it.
"""

import dataclasses

import jax
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.hf import convert
from gated_jax.model.decoder import Decoder

ROWS, LENGTH = 8, 32
DOCUMENTS = (7, 14, 11)  # lengths that fill a row
MESHES = {
  'fsdp': MeshConfig(fsdp=8),
  'tensor': MeshConfig(tensor=4, data=2),
  'expert': MeshConfig(expert=4, fsdp=2),
  'context': MeshConfig(context=4, data=2),
}
# A family for each mesh that splits what it has more of than others.
EVERY_RUN = [('context', 'qwen3_5_hybrid'), ('tensor', 'trinity')]
MORE = [
  ('expert', 'laguna'),
  ('expert', 'qwen3_5_moe'),
  ('fsdp', 'muse_glimmer'),
  ('tensor', 'step'),
]
# Programs of this size take longer to optimise than to run.
QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def batch_of(vocab):
  """Rows of three documents, cut elsewhere in every row."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, vocab, (2, ROWS, LENGTH), np.int32)
  segments = np.stack(
    [np.repeat(np.arange(1, 4), np.roll(DOCUMENTS, i)) for i in range(ROWS)]
  )
  begins = np.array([np.argmax(s == d) for s in segments for d in s])
  positions = np.arange(LENGTH) - begins.reshape(ROWS, LENGTH)
  return {
    'tokens': tokens,
    'targets': targets,
    'segments': segments.astype(np.int32),
    'positions': positions.astype(np.int32),
    'weights': rng.uniform(0.5, 2.0, segments.shape).astype(np.float32),
  }


def slopes(config, params, batch):
  """Loss, and gradients of every parameter."""

  def loss(params, batch):
    return (
      Decoder(config)
      .apply({'params': params}, batch, method='loss', deterministic=True)
      .total
    )

  run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
  return jax.device_get(run(params, batch))


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
  """A function from a family's case to its folder and one device's slopes."""
  made = {}

  def make(name, cases, make_params):
    if name not in made:
      family, config = cases[name]
      # Heads that four devices share evenly, in every layer.
      words = {
        key: tuple(
          w.replace('heads=6', 'heads=8') for w in getattr(config, key)
        )
        for key in ('lead', 'pattern')
      }
      config = dataclasses.replace(config, **words)
      folder = tmp_path_factory.mktemp(name) / 'x'
      convert.save(folder, make_params(config), config, family)
      made[name] = folder, slopes(*convert.load(folder), batch_of(config.vocab))
    return made[name]

  return make


def check(mesh, name, folder_of, cases, make_params):
  folder, (loss, gradients) = folder_of(name, cases, make_params)
  made = sharding.make_mesh(MESHES[mesh])
  config, params = convert.load(folder, made)
  batch = jax.device_put(batch_of(config.vocab), sharding.batch_sharding(made))
  with sharding.activate(made):
    found, found_gradients = slopes(config, params, batch)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  flat, expected = map(convert.flatten, (found_gradients, gradients))
  assert set(flat) == set(expected)
  for path, gradient in expected.items():
    scale = max(np.abs(gradient).max(), 1e-6)
    off = np.abs(flat[path] - gradient).max() / scale
    assert off <= 1e-4, f'{path} is off by {off:.1e} of its largest'


@pytest.mark.long
@pytest.mark.parametrize(('mesh', 'name'), EVERY_RUN)
def test_a_folder_on_a_mesh(mesh, name, folder_of, cases, make_params):
  check(mesh, name, folder_of, cases, make_params)


@pytest.mark.nightly
@pytest.mark.parametrize(('mesh', 'name'), MORE)
def test_a_folder_on_another_mesh(mesh, name, folder_of, cases, make_params):
  check(mesh, name, folder_of, cases, make_params)
