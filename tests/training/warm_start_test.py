"""A new run on the parameters of another computes the other's function."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from gated_jax import checkpoint
from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training.warm_start import check_same_function
from gated_jax.training.warm_start import load_start

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

MODEL = ModelConfig(
  vocab=32,
  length=256,
  depth=4,
  pattern=('attention:window=4', 'attention'),
  width=16,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=16,
  dtype='float32',
)
TOKENS = np.arange(16).reshape(2, 8) % 32


def run(model=MODEL, **settings):
  return RunConfig(model=model, **settings)


@pytest.fixture(scope='module')
def made():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=1), jax.devices()[:2])
  rng = np.random.default_rng(0)
  return mesh, jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    abstract_parameters(MODEL),
  )


@pytest.fixture(scope='module')
def saved(made, tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'model'
  checkpoint.save_parameters(folder, made[1], run())
  return str(folder)


# How else the same layers may be written down.
LAYOUTS = {
  'the same': {},
  'unscanned': {'scan': False},
  'one long pattern': {'pattern': MODEL.pattern * 2},
  'a lead': {'lead': MODEL.pattern, 'pattern': MODEL.pattern},
  'shorter': {'length': 255},
  'other execution': {'remat': 'full', 'param_dtype': 'bfloat16'},
}


@pytest.mark.parametrize('change', LAYOUTS.values(), ids=LAYOUTS)
def test_layers_may_be_laid_out_in_any_way(change, made, saved):
  mesh, params = made
  model = dataclasses.replace(MODEL, **change)
  data = dataclasses.replace(RunConfig().data, length=64)
  abstract = abstract_parameters(model, mesh)
  loaded = load_start(run(model, init_from=saved, data=data), abstract, mesh)
  same = jax.tree.map(
    lambda x, y: (
      (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    ),
    loaded,
    abstract,
  )
  assert jax.tree.all(same)
  expected = jax.jit(Decoder(MODEL).apply)({'params': params}, TOKENS)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), loaded)
  logits = jax.jit(Decoder(model).apply)({'params': wide}, TOKENS)
  tolerance = 1e-5 if loaded['embed']['embedding'].dtype == 'float32' else 0.1
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


# A setting that changes no shape, and what is said of it.
FUNCTIONS = {
  'model.rope.base': {'rope': RopeConfig(base=1e6)},
  'model.norm_zero_centered': {'norm_zero_centered': True},
  'model.norm_eps': {'norm_eps': 1e-5},
  'model.gate.activation': {'gate': GateConfig(activation='two_sigmoid')},
  'model.pattern': {'pattern': ('attention:window=5', 'attention')},
  'model.qk_norm': {'qk_norm': False},
  'model.tie_embeddings': {'tie_embeddings': False},
  'model.vocab': {'vocab': 40},
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_another_function_is_refused_by_name(name, made, saved):
  model = dataclasses.replace(MODEL, **FUNCTIONS[name])
  config = run(model, init_from=saved)
  with pytest.raises(ValueError, match=f'another function: {name} is') as error:
    load_start(config, {}, made[0])
  assert ';' not in str(error.value)
  assert f'--config.init_changes="(\'{name}\',)"' in str(error.value)
  allowed = dataclasses.replace(config, init_changes=(name,))
  check_same_function(MODEL, allowed)


def test_a_group_of_settings_may_be_allowed_to_change(made, saved):
  mesh, params = made
  rope = RopeConfig(base=1e6, scaling='yarn', factor=2.0, original_length=128)
  model = dataclasses.replace(MODEL, rope=rope)
  config = run(model, init_from=saved, init_changes=('model.rope',))
  loaded = load_start(config, abstract_parameters(model, mesh), mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  with pytest.raises(ValueError, match=r'model\.rope\.factor is 1\.0 there'):
    check_same_function(MODEL, run(model, init_changes=('model.rope.base',)))


def test_settings_without_effect_may_differ(made):
  yarn = RopeConfig(beta_fast=7.0)
  none = dataclasses.replace(MODEL, gate=GateConfig(position='none'))
  other = dataclasses.replace(
    none, rope=yarn, gate=GateConfig(position='none', activation='silu')
  )
  check_same_function(none, run(other))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('model.rope.bse', 'did you mean model.rope.base'),
    ('model.dropout', "'model.dropout' is no setting of the model"),
    ('steps', "'steps' is no setting of the model"),
  ],
)
def test_what_may_change_is_a_setting_of_the_model(name, message):
  with pytest.raises(ValueError, match=message):
    run(init_changes=(name,))


def test_a_shape_cannot_change(made, saved):
  mesh, _ = made
  model = dataclasses.replace(MODEL, vocab=40)
  config = run(model, init_from=saved, init_changes=('model.vocab',))
  with pytest.raises(ValueError, match='holds another model'):
    load_start(config, abstract_parameters(model, mesh), mesh)


@pytest.mark.nightly
def test_a_gate_that_may_be_added_begins_open(made, tmp_path):
  mesh, _ = made
  plain = dataclasses.replace(
    MODEL, gate=GateConfig(position='none'), scan=False
  )
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    abstract_parameters(plain),
  )
  checkpoint.save_parameters(tmp_path / 'model', params, run(plain))
  gated = dataclasses.replace(
    MODEL, gate=GateConfig(activation='two_sigmoid', init='zeros')
  )
  config = run(gated, init_from=str(tmp_path / 'model'))
  with pytest.raises(ValueError, match=r'model\.gate\.position is'):
    load_start(config, abstract_parameters(gated, mesh), mesh)
  config = dataclasses.replace(config, init_changes=('model.gate',))
  fresh = Decoder(gated).init(jax.random.key(0), TOKENS)['params']
  loaded = load_start(
    config, abstract_parameters(gated, mesh), mesh, nn.unbox(fresh)
  )
  logits = jax.jit(Decoder(gated).apply)({'params': loaded}, TOKENS)
  expected = jax.jit(Decoder(plain).apply)({'params': params}, TOKENS)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


def test_nothing_else_can_be_added_to_a_trained_model(made, saved):
  mesh, _ = made
  model = dataclasses.replace(MODEL, norm='sandwich')
  config = run(model, init_from=saved, init_changes=('model.norm',))
  with pytest.raises(
    ValueError, match=r'does not have .*norm.*; only adapters'
  ):
    load_start(config, abstract_parameters(model, mesh), mesh)
