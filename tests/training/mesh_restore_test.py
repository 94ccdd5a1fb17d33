"""A checkpoint saved on one mesh restores on another, to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.checkpoint import load_parameters
from gated_jax.config import DataConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.model.decoder import Decoder
from gated_jax.training.build import make_functions
from gated_jax.training.checkpoints import Checkpoints

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

CONFIG = RunConfig(
  model=ModelConfig(
    vocab=64,
    length=32,
    depth=2,
    width=32,
    heads=8,
    kv_heads=2,
    head_dim=4,
    mlp_width=32,
    dtype='float32',
    pattern=('attention+moe',),
    moe=MoEConfig(experts=8, top_k=2, width=16, shared_width=16),
  ),
  data=DataConfig(length=32),
  optimizer=OptimizerConfig(name='muon'),
)
SAVED = MeshConfig(fsdp=2, expert=2, tensor=2)
ONE = MeshConfig()
RESTORED = [
  ONE,
  SAVED,
  MeshConfig(fsdp=8),
  MeshConfig(tensor=8),  # wider than kv heads
  MeshConfig(expert=4, context=2),
  MeshConfig(data=2, fsdp=2, tensor=2),
]


def abstract_on(mesh_config):
  """A state's shapes and places; ONE is one device of the eight."""
  config = dataclasses.replace(CONFIG, mesh=mesh_config)
  devices = jax.devices()[:1] if mesh_config == ONE else jax.devices()
  mesh = sharding.make_mesh(mesh_config, devices)
  with sharding.activate(mesh):
    return config, make_functions(config, Decoder(config.model), mesh)[0]


def filled(abstract):
  """A state in which every entry of every array is different."""
  rng = np.random.default_rng(0)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      values = rng.normal(size=x.shape)
    else:
      values = rng.integers(1, 100, x.shape)
    return jax.device_put(np.asarray(values, x.dtype), x.sharding)

  return jax.tree.map(fill, abstract)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  config, abstract = abstract_on(SAVED)
  state = filled(abstract)
  checkpoints = Checkpoints(folder, config)
  checkpoints.save(state, 'a place')
  checkpoints.wait()
  checkpoints.close()
  return folder, jax.device_get(state)


def assert_equal(found, expected, abstract):
  places = jax.tree.leaves(abstract)
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(expected),
    places,
    strict=True,
  )
  for (path, a), b, place in pairs:
    name = jax.tree_util.keystr(path)
    assert a.sharding == place.sharding, name
    assert a.dtype == b.dtype, name
    np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize('mesh', RESTORED, ids=lambda m: str(m.axes))
def test_a_state_restores_on_another_mesh(saved, mesh):
  folder, expected = saved
  config, abstract = abstract_on(mesh)
  checkpoints = Checkpoints(folder, config)
  found, place, changed = checkpoints.restore(abstract)
  checkpoints.close()
  assert place == 'a place'
  assert set(changed) <= {f'mesh.{name}' for name in mesh.axes}
  assert_equal(found, expected, abstract)


def test_parameters_alone_restore_on_another_mesh(saved):
  folder, expected = saved
  _, abstract = abstract_on(MeshConfig(fsdp=4, tensor=2))
  found = load_parameters(folder, abstract.params)
  assert_equal(found, expected.params, abstract.params)
