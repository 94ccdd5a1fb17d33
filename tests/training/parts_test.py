"""What does not train has no optimizer state and keeps every bit."""

import dataclasses

import jax
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import CheckpointConfig
from gated_jax.config import DataConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training import loop
from gated_jax.training.build import make_functions
from gated_jax.training.parts import Part
from gated_jax.training.parts import trained_part

MODEL = ModelConfig(
  vocab=320, depth=2, width=16, heads=2, kv_heads=1, head_dim=8,
  mlp_width=16, length=16, dtype='float32',
)  # fmt: skip
CONFIG = RunConfig(
  steps=4,
  log_every=1,
  eval_every=0,
  eval_batches=1,
  probe_every=0,
  figures=False,
  model=MODEL,
  data=DataConfig(source='synthetic', batch=8, length=16, validation=0),
  optimizer=OptimizerConfig(warmup_steps=0, train='*/gate,final_norm'),
  mesh=MeshConfig(fsdp=4, tensor=2),
  checkpoint=CheckpointConfig(every=2),
)


def moments(config):
  """Shapes of the matrices that an optimizer keeps."""
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  with sharding.activate(mesh):
    state = make_functions(config, Decoder(config.model), mesh)[0]
  return [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_only_what_trains_has_optimizer_state(name):
  def shapes(train):
    new = dataclasses.replace(CONFIG.optimizer, name=name, train=train)
    return moments(dataclasses.replace(CONFIG, optimizer=new))

  boxed = boxed_parameters(MODEL)
  gate = boxed['layers']['attention']['gate']['kernel'].value.shape
  assert shapes('*/gate') == [gate] * 2
  # Muon keeps one array for each matrix; the gate is updated by AdamW.
  query = boxed['layers']['attention']['query']['kernel'].value.shape
  expected = [gate] * 2 + [query] * (1 if name == 'muon' else 2)
  assert sorted(shapes('*/gate,*/query')) == sorted(expected)
  assert shapes('*') == shapes('all')


def test_a_part_is_taken_out_and_put_back():
  params = {'a': {'x': 1, 'y': 2}, 'b': 3}
  part = Part(frozenset({('a', 'x')}))
  assert part.of(params) == {'a': {'x': 1}}
  assert part.put({'a': {'x': 5}}, params) == {'a': {'x': 5, 'y': 2}, 'b': 3}
  assert Part().of(params) is params


def test_an_empty_pattern_is_refused():
  with pytest.raises(ValueError, match='none of them empty'):
    OptimizerConfig(train='*/gate,')


def run(folder, steps, **settings):
  """The parameters and the optimizer's state that a run ends with."""
  states = []
  config = dataclasses.replace(CONFIG, steps=steps, **settings)
  loop.run(config, folder, callbacks=[lambda p: states.append(
    jax.device_get((p.state.params, p.state.opt_state))) or False])  # fmt: skip
  return states


@pytest.mark.nightly
def test_the_rest_does_not_move_and_a_run_resumes_to_the_bit(tmp_path, capsys):
  schedule = dataclasses.replace(CONFIG.optimizer, schedule='constant')
  states = run(tmp_path / 'whole', 4, optimizer=schedule)
  assert 'parameters, of which 528 train;' in capsys.readouterr().out
  first, last = states[0][0], states[-1][0]
  part = trained_part(CONFIG.optimizer.train, boxed_parameters(MODEL))
  for path, x in jax.tree_util.tree_leaves_with_path(first):
    names = tuple(str(key.key) for key in path)
    y = last
    for name in names:
      y = y[name]
    assert np.array_equal(x, y) == (names not in part.paths), names
  run(tmp_path / 'parts', 2, optimizer=schedule)
  resumed = run(tmp_path / 'parts', 4, optimizer=schedule)
  jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])
