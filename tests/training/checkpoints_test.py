"""What is saved comes back to the bit; what is damaged is found and left."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gated_jax import checkpoint
from gated_jax.checkpoint.folder import RUN
from gated_jax.checkpoint.folder import seal
from gated_jax.config import CheckpointConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.training import checkpoints
from gated_jax.training import continuation
from gated_jax.training import step_reader
from gated_jax.training.step import TrainState

ROOT = pathlib.Path(__file__).parents[2]
NEVER = float('inf')


def state_at(step):
  params = {
    'embed': {'embedding': jnp.arange(12.0).reshape(3, 4) + step},
    'layers': {'scale': jnp.full((2, 4), step, jnp.bfloat16)},
  }
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=optax.adam(0.1).init(params),
    key=jax.random.key_data(jax.random.key(step)),
    skipped=zero,
    bad_in_row=zero,
  )


def abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    state_at(0),
  )


def open_at(folder, say=print, **settings):
  config = RunConfig(**{'checkpoint': CheckpointConfig(), **settings})
  return checkpoints.Checkpoints(folder, config, say)


def saved(folder, losses, **settings):
  """A folder with steps 1, 2, ... of these validation losses."""
  manager = open_at(folder, **settings)
  for step, loss in enumerate(losses, 1):
    manager.save(state_at(step), f'place {step}', loss)
  manager.wait()
  steps = manager.steps
  manager.close()
  return steps


def test_a_state_comes_back_to_the_bit(tmp_path):
  saved(tmp_path, [NEVER])
  state, place, changed = open_at(tmp_path).restore(abstract())
  assert (place, changed) == ('place 1', {})
  for found, kept in zip(
    jax.tree.leaves(state), jax.tree.leaves(state_at(1)), strict=True
  ):
    assert found.dtype == kept.dtype
    np.testing.assert_array_equal(found, kept)


def test_the_last_and_the_best_are_kept(tmp_path):
  config = CheckpointConfig(keep_last=2, keep_best=1)
  losses = [3.0, 1.0, 2.0, NEVER, 1.5]
  assert saved(tmp_path, losses, checkpoint=config) == [2, 4, 5]


def test_the_best_is_kept_by_a_run_that_resumes_and_by_losses_of_old(tmp_path):
  config = CheckpointConfig(keep_last=1, keep_best=1)
  saved(tmp_path, [2.0, 1.0], checkpoint=CheckpointConfig(keep_last=2))
  # Earlier checkpoints have the loss in a file of its own, without a digest.
  path = tmp_path / '1' / RUN
  run = {k: v for k, v in json.loads(path.read_bytes()).items() if k != 'loss'}
  del run['digest']
  path.write_text(json.dumps(seal(run)))
  (tmp_path / '1' / 'metrics').mkdir()
  (tmp_path / '1' / 'metrics' / 'metrics').write_text('{"loss": 0.5}')
  manager = open_at(tmp_path, checkpoint=config)
  manager.save(state_at(3), 'place 3', 3.0)
  manager.wait()
  assert manager.steps == [1, 3]


def test_a_run_goes_on_with_the_loss_it_began_with(tmp_path):
  def restored(loss):
    config = RunConfig()
    manager = checkpoints.Checkpoints(tmp_path, config, print, loss)
    if not manager.steps:
      manager.save(state_at(1), 'place')
      manager.wait()
    return manager.restore(abstract())[2]

  assert restored('mine') == {}
  assert restored('renamed') == {'loss': ('mine', 'renamed')}
  with pytest.raises(
    continuation.CannotResume,
    match="by the loss mine, and not the model's loss",
  ):
    restored('')


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  assert open_at(tmp_path / 'new').restore(abstract()) is None


def damage(path, how):
  data = path.read_bytes()
  if how == 'delete':
    path.unlink()
  elif how == 'truncate':
    path.write_bytes(data[: len(data) // 2])
  else:
    middle = len(data) // 2
    flipped = bytes([data[middle] ^ 0x10])
    path.write_bytes(data[:middle] + flipped + data[middle + 1 :])


def test_a_damaged_step_can_be_made_again(tmp_path):
  saved(tmp_path, [NEVER, NEVER])
  damage(tmp_path / '2/run/metadata', 'truncate')
  manager = open_at(tmp_path, lambda text: None)
  assert int(manager.restore(abstract())[0].step) == 1
  manager.save(state_at(2), 'place 2')
  manager.wait()
  assert manager.steps == [1, 2]
  assert (tmp_path / 'damaged-2').is_dir()


def test_a_value_that_changed_silently_is_found(tmp_path, monkeypatch):
  saved(tmp_path, [NEVER])
  manager = open_at(tmp_path, lambda text: None)
  real = step_reader.read_arrays

  def other(folder, items):
    found = real(folder, items)
    found['params']['layers']['scale'] *= 2
    return found

  monkeypatch.setattr(step_reader, 'read_arrays', other)
  with pytest.raises(checkpoint.CheckpointError, match='could be read'):
    manager.restore(abstract())


def test_what_else_lies_there_is_left_alone(tmp_path, caplog):
  saved(tmp_path, [NEVER])
  stray = ['7', '\u00b2', 'notes.txt', '3.orbax', '05']
  for name in stray:
    (tmp_path / name).write_text('mine')
  (tmp_path / 'copy of 1').mkdir()
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()  # of a save that was killed
  manager = open_at(tmp_path)
  assert int(manager.restore(abstract())[0].step) == 1
  manager.save(state_at(2), 'place 2')
  manager.wait()
  manager.close()
  assert checkpoint.find(tmp_path) == tmp_path / '2'
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {*stray, 'copy of 1', '1', '2'}
  checkpoint.load_parameters(tmp_path, abstract().params)
  assert not caplog.records


def test_damaged_steps_alone_are_no_reason_to_start_anew(tmp_path):
  saved(tmp_path, [NEVER])
  for path in tmp_path.glob('1/rest/d/*'):
    damage(path, 'truncate')
  for _ in range(2):  # the second time it has been put aside already
    manager = open_at(tmp_path, lambda text: None)
    with pytest.raises(checkpoint.CheckpointError, match='remove damaged-1 to'):
      manager.restore(abstract())
    manager.close()
  (tmp_path / 'damaged-1').rename(tmp_path.parent / 'elsewhere')
  assert open_at(tmp_path).restore(abstract()) is None


def test_another_model_is_refused_with_what_differs(tmp_path):
  saved(tmp_path, [NEVER])
  other = open_at(tmp_path, model=ModelConfig(width=512, depth=4))
  with pytest.raises(ValueError) as error:
    other.restore(abstract())
  text = str(error.value)
  assert 'another model' in text
  assert '\n' not in text
  assert 'model.width is 2048 there and 512 here' in text
  assert 'model.depth is 28 there and 4 here' in text


def test_settings_that_matter_are_refused_and_others_announced(tmp_path):
  saved(tmp_path, [NEVER])
  same = open_at(tmp_path, steps=5000, log_every=1)
  assert same.restore(abstract())[2] == {
    'steps': (1000, 5000),
    'log_every': (10, 1),
  }
  hotter = OptimizerConfig(learning_rate=1.0)
  with pytest.raises(ValueError, match=r'learning_rate is 0.0003 .* 1.0 here'):
    open_at(tmp_path, optimizer=hotter).restore(abstract())


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints, 'gather', lambda mine: [mine, mine])
  saved(tmp_path, [NEVER])
  with pytest.raises(ValueError, match=r'2 processes and cannot be .* by 1'):
    open_at(tmp_path).restore(abstract())


def test_parameters_and_config_can_be_had_alone(tmp_path):
  workdir = tmp_path / 'run'
  saved(workdir / 'checkpoints', [NEVER, NEVER], steps=123)
  step = workdir / 'checkpoints' / '2'
  for path in (workdir, workdir / 'checkpoints', step):
    assert checkpoint.find(path) == step
  assert checkpoint.load_config(workdir).steps == 123
  found = checkpoint.load_parameters(workdir, abstract().params)
  np.testing.assert_array_equal(
    found['embed']['embedding'], state_at(2).params['embed']['embedding']
  )
  wrong = dataclasses.replace(abstract(), params={'w': jnp.zeros(3)}).params
  with pytest.raises(ValueError, match=r'embed/embedding is .3, 4. there'):
    checkpoint.load_parameters(workdir, wrong)
  with pytest.raises(ValueError, match='no checkpoint at'):
    checkpoint.find(tmp_path / 'nowhere')


def test_a_save_that_fails_leaves_the_last_good_one(tmp_path):
  """A size limit on files stands for a full disk."""
  code = f"""
    import resource, sys, pathlib
    sys.path.insert(0, {str(ROOT / 'tests' / 'training')!r})
    import checkpoints_test as t
    folder = pathlib.Path({str(tmp_path)!r})
    manager = t.open_at(folder)
    manager.save(t.state_at(1), 'place 1')
    manager.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    try:
      manager.save(t.state_at(2), 'place 2')
      manager.save(t.state_at(3), 'place 3')
    except t.checkpoint.CheckpointError as error:
      print(error)
    manager.close()
    """
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  found = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    capture_output=True,
    text=True,
    check=True,
    env=environment,
  )
  (line,) = [x for x in found.stdout.splitlines() if x]
  assert 'could not save step 2 in' in line
  assert f'the last good one is {tmp_path / "1"}' in line
  assert 'too large' in line
  state, place, _ = open_at(tmp_path).restore(abstract())
  assert (int(state.step), place) == (1, 'place 1')
