"""A folder on a mesh of eight devices is the model that it is on one.

Every family, read straight onto the mesh: loss and all gradients of packed rows.
The tensor axis is wider than the kv heads, and a row's documents end inside of
the parts that the context axis makes of it.

Both are computed in float64, where they agree to the last few bits. In float32
the norms after small outputs of linear attention enlarge every rounding, on one
device as on eight (docs/delta.md), and would hide a fault of the same size.
"""

import dataclasses
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.hf import convert
from gated_jax.model.decoder import Decoder
from tests.quick import QUICK

CLOSE = 1e-10  # of the largest gradient of a tensor
ROWS, LENGTH = 8, 32
DOCUMENTS = (7, 14, 11)  # lengths that fill a row
MESHES = {
  'data': MeshConfig(data=8),
  'fsdp': MeshConfig(fsdp=8),
  'tensor': MeshConfig(tensor=4, data=2),
  'expert': MeshConfig(expert=4, fsdp=2),
  'context': MeshConfig(context=4, data=2),
  # Sums over a tensor axis inside of an exchange, before a norm of the rows.
  'both': MeshConfig(expert=2, tensor=4),
}
FAMILIES = (
  'qwen3_windows',
  'qwen3_moe_mixed',
  'gated_elementwise',
  'qwen3_5_hybrid',
  'qwen3_5_moe',
  'qwen3_next_moe',
  'trinity',
  'muse_glimmer',
  'laguna',
  'step',
  'lfm3',
  'beam',
  'olmo_hybrid_rope',
  'muse_spark',
)
WITH_EXPERTS = (
  'qwen3_moe_mixed',
  'qwen3_5_moe',
  'qwen3_next_moe',
  'trinity',
  'laguna',
  'step',
  'beam',
  'muse_spark',
)
ALL = [
  (mesh, family)
  for mesh, family in itertools.product(MESHES, FAMILIES)
  if mesh not in ('expert', 'both') or family in WITH_EXPERTS
  if mesh != 'both' or family == 'muse_spark'
]
# Heads of both kinds, and experts with a bias. States that are handed on have a
# test of their own: tests/model/gated_deltanet_test.py.
EVERY_RUN = [('tensor', 'trinity')]


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
  """Loss, and gradients of every parameter, in float64."""

  def loss(params, batch):
    return (
      Decoder(config)
      .apply({'params': params}, batch, method='loss', deterministic=True)
      .total
    )

  def widen(x):
    return x.astype('float64') if x.dtype == 'float32' else x

  config = dataclasses.replace(config)
  # Settings refuse a dtype that nobody should train in.
  object.__setattr__(config, 'dtype', 'float64')
  with (
    jax.enable_x64(True),
    # Some arrays are float32 whatever the model's dtype is.
    mock.patch.object(jnp, 'float32', jnp.float64),
  ):
    run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    found = jax.device_get(run(*jax.tree.map(widen, (params, batch))))
  assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype('float64')}
  return found


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
  np.testing.assert_allclose(found, loss, rtol=1e-12)
  flat, expected = map(convert.flatten, (found_gradients, gradients))
  assert set(flat) == set(expected)
  off, path = max(
    (np.abs(flat[path] - gradient).max() / np.abs(gradient).max(), path)
    for path, gradient in expected.items()
    if np.abs(gradient).max() > 1e-12
  )
  print(f'{mesh}, {name}: {off:.1e} of the largest', end=' ')
  assert off <= CLOSE, f'{path} is off by {off:.1e} of its largest'


@pytest.mark.long
@pytest.mark.parametrize(('mesh', 'name'), EVERY_RUN)
def test_a_folder_on_a_mesh(mesh, name, folder_of, cases, make_params):
  check(mesh, name, folder_of, cases, make_params)


@pytest.mark.nightly
@pytest.mark.parametrize(
  ('mesh', 'name'), [pair for pair in ALL if pair not in EVERY_RUN]
)
def test_every_other_folder_and_mesh(mesh, name, folder_of, cases, make_params):
  check(mesh, name, folder_of, cases, make_params)
