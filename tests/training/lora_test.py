"""Adapters are trained beside a base that another run made."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from gated_jax import checkpoint
from gated_jax import sharding
from gated_jax.checkpoint.sums import array_names
from gated_jax.config import CheckpointConfig
from gated_jax.config import DataConfig
from gated_jax.config import GateConfig
from gated_jax.config import LoraConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.decode import weights
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training import loop
from gated_jax.training.warm_start import check_same_function
from gated_jax.training.warm_start import load_start

PLAIN = ModelConfig(
  vocab=320, depth=2, width=16, heads=2, kv_heads=1, head_dim=8,
  mlp_width=16, length=16, dtype='float32',
)  # fmt: skip
MODEL = dataclasses.replace(
  PLAIN, lora=LoraConfig(rank=2, matrices='*/gate', dropout=0.25)
)
CONFIG = RunConfig(
  steps=4,
  log_every=1,
  eval_every=0,
  eval_batches=1,
  probe_every=0,
  figures=False,
  model=MODEL,
  data=DataConfig(source='synthetic', batch=8, length=16),
  optimizer=OptimizerConfig(
    warmup_steps=0, train='adapters', schedule='constant', learning_rate=0.1
  ),
  mesh=MeshConfig(fsdp=4, tensor=2),
  checkpoint=CheckpointConfig(every=2),
)
TOKENS = np.arange(16).reshape(2, 8)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A checkpoint of a base, and its parameters."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.1).astype(x.dtype),
    abstract_parameters(PLAIN),
  )
  folder = tmp_path_factory.mktemp('base') / 'model'
  config = RunConfig(model=PLAIN, data=CONFIG.data)
  checkpoint.save_parameters(folder, params, config)
  return str(folder), params


def train(folder, start, steps):
  """The state after each step."""
  states = []

  def note(progress):
    states.append(jax.device_get(progress.state))

  config = dataclasses.replace(CONFIG, steps=steps, init_from=start)
  return loop.run(config, folder, callbacks=[note]), states


@pytest.mark.nightly
def test_adapters_train_resume_and_merge(base, tmp_path, capsys):
  start, params = base
  result, states = train(tmp_path / 'whole', start, 4)
  assert 'of which 128 train' in capsys.readouterr().out
  assert result.validation.loss < 6
  last = states[-1]
  jax.tree.map(
    np.testing.assert_array_equal, adapters.without(last.params), params
  )
  moments = [x.shape for x in jax.tree.leaves(last.opt_state) if x.ndim > 1]
  thin = {
    path: x
    for path, x in traverse_util.flatten_dict(last.params).items()
    if adapters.is_adapter(path)
  }
  assert sorted(moments) == sorted(2 * [x.shape for x in thin.values()])
  assert all(np.any(x) for x in thin.values())

  train(tmp_path / 'parts', start, 2)
  _, resumed = train(tmp_path / 'parts', start, 4)
  jax.tree.map(np.testing.assert_array_equal, resumed[-1], last)

  # A checkpoint holds the adapters, and where the base is.
  stored = checkpoint.read_run(checkpoint.find(tmp_path / 'parts'))
  assert stored['base']['path'] == start
  left = set(array_names(adapters.without(last.params), 'params'))
  assert set(stored['base']['arrays']) == left

  # Decoding loads the run; a new run without adapters takes their sum.
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  _, model, merged = weights.load(tmp_path / 'whole', mesh)
  expected = Decoder(MODEL).apply({'params': last.params}, TOKENS)
  found = model.apply({'params': merged}, TOKENS)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  plain = RunConfig(
    model=PLAIN, init_from=str(tmp_path / 'whole'), data=CONFIG.data
  )
  taken = load_start(plain, abstract_parameters(PLAIN, mesh), mesh)
  found = Decoder(PLAIN).apply({'params': taken}, TOKENS)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_base_is_loaded_as_it_is_and_adapters_are_fresh(base):
  start, params = base
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  config = dataclasses.replace(CONFIG, init_from=start)
  abstract = abstract_parameters(MODEL, mesh)
  fresh = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), abstract)
  found = load_start(config, abstract, mesh, fresh)
  jax.tree.map(np.testing.assert_array_equal, adapters.without(found), params)
  gate = found['layers']['attention']['gate']
  assert np.all(gate['kernel_lora_a'] == 7)
  assert np.all(gate['kernel_lora_b'] == 7)


@pytest.mark.parametrize(
  ('there', 'here', 'named'),
  [
    (PLAIN, MODEL, ''),
    (MODEL, PLAIN, ''),
    (MODEL, MODEL, ''),
    (
      MODEL,
      dataclasses.replace(MODEL, lora=LoraConfig(rank=4, matrices='*/gate')),
      'model.lora.rank is 2 there and 4 here',
    ),
    (
      dataclasses.replace(PLAIN, gate=GateConfig(activation='silu')),
      MODEL,
      'model.gate.activation',
    ),
  ],
)
def test_adapters_fit_their_own_base_alone(there, here, named):
  train = 'adapters' if here.lora.rank else 'all'
  config = RunConfig(
    model=here, data=CONFIG.data, optimizer=OptimizerConfig(train=train)
  )
  if not named:
    check_same_function(there, config)
    return
  with pytest.raises(ValueError, match=f'another function: {named}') as error:
    check_same_function(there, config)
  assert '\n' not in str(error.value)
