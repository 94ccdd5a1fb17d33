"""A checkpoint holds what was trained, and finds the rest where it lies."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax import paths
from gated_jax.checkpoint import base
from gated_jax.checkpoint.base import base_for
from gated_jax.checkpoint.folder import RUN
from gated_jax.checkpoint.sums import records
from gated_jax.config import CheckpointConfig
from gated_jax.config import RunConfig
from gated_jax.training import checkpoints
from tests.training.checkpoints_test import abstract
from tests.training.checkpoints_test import damage
from tests.training.checkpoints_test import state_at

FROZEN = 'params/embed/embedding'


def state(step):
  """The state of a step in which the embedding stays that of step 0."""
  new = state_at(step)
  return new.replace(
    params={**new.params, 'embed': state_at(0).params['embed']}
  )


def open_at(folder, start, **settings):
  config = RunConfig(
    init_from=str(start), checkpoint=CheckpointConfig(**settings)
  )
  return checkpoints.Checkpoints(folder, config, lambda text: None)


def save(folder, start, steps=(1,), left=None):
  """Saves steps of a run that started at `start`; its workdir."""
  manager = open_at(folder / 'checkpoints', start)
  arrays = records(state(0).params, 'params')
  manager.base = left or base_for(start, arrays, [FROZEN])
  for step in steps:
    manager.save(state(step), f'place {step}')
  manager.wait()
  manager.close()
  return folder


def restore(workdir, start, **settings):
  manager = open_at(workdir / 'checkpoints', start, **settings)
  try:
    return manager.restore(abstract())
  finally:
    manager.close()


def same(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def put(folder, step=0):
  checkpoint.save_parameters(folder, state_at(step).params, RunConfig())
  return folder


@pytest.fixture
def made(tmp_path):
  """Where the base is, and the workdir of a run on it."""
  start = put(tmp_path / 'base')
  return start, save(tmp_path / 'run', start)


def test_what_is_frozen_is_left_where_it_is(made):
  start, run = made
  stored = checkpoint.read_run(run / 'checkpoints/1')
  assert stored['base']['arrays'] == [FROZEN]
  assert stored['base']['path'] == os.path.abspath(start)
  metadata = json.loads((run / 'checkpoints/1/params/_METADATA').read_text())
  assert not any('embed' in name for name in metadata['tree_metadata'])
  same(restore(run, start)[0], state(1))
  same(checkpoint.load_parameters(run, abstract().params), state(1).params)
  same(
    checkpoint.load_parameters(run, abstract().params, sparing=True),
    state(1).params,
  )


@pytest.mark.parametrize('how', ['note', 'setting', 'together'])
def test_a_base_that_moved_is_found_where_one_says(made, how, tmp_path):
  start, run = made
  if how == 'together':
    (tmp_path / 'new').mkdir()
    shutil.move(run, tmp_path / 'new/run')
    run = tmp_path / 'new/run'
  place = shutil.move(start, tmp_path / 'new/base')
  if how == 'note':
    (run / 'base.txt').write_text(f'{place}\n')
  setting = place if how == 'setting' else start
  same(restore(run, setting)[0], state(1))
  if how == 'setting':
    with pytest.raises(base.NoBase, match='its base is not at'):
      checkpoint.load_parameters(run, abstract().params)
  else:
    same(checkpoint.load_parameters(run, abstract().params), state(1).params)


def test_a_run_does_not_go_on_beside_another_base(made, tmp_path):
  start, run = made
  other = put(tmp_path / 'other', 5)
  with pytest.raises(
    checkpoint.CheckpointError, match="other' holds other parameters than"
  ) as error:
    restore(run, other)
  assert '\n' not in str(error.value)
  copy = shutil.copytree(start, tmp_path / 'copy')
  same(restore(run, copy)[0], state(1))


def no_base(start):
  shutil.rmtree(start)


def another_base(start):
  shutil.rmtree(start)
  put(start, 5)


def truncated(start):
  damage(start / RUN, 'truncate')


def flipped(start):
  files = [p for p in (start / 'params').rglob('*') if p.is_file()]
  for path in files:
    if '/d/' in str(path):
      damage(path, 'flip')


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (no_base, 'its base is not at .*base; write where it is into .*base.txt'),
    (another_base, 'other parameters lie there now'),
    (truncated, 'its base cannot be read: .*is damaged in run/metadata'),
    (flipped, 'is damaged'),
  ],
)
def test_a_bad_base_is_one_line_and_loses_nothing(made, change, said):
  start, run = made
  change(start)
  for read in (
    lambda: restore(run, start),
    lambda: checkpoint.load_parameters(run, abstract().params),
  ):
    with pytest.raises((ValueError, RuntimeError), match=said) as error:
      read()
    assert '\n' not in str(error.value)
  assert os.listdir(run / 'checkpoints') == ['1'], 'no step is put aside'


def test_a_note_that_names_nothing_is_named(made):
  start, run = made
  shutil.rmtree(start)
  (run / 'checkpoints/base.txt').write_text('/nowhere')
  with pytest.raises(base.NoBase, match=r'/nowhere, which .*base\.txt names'):
    checkpoint.load_parameters(run, abstract().params)


def test_a_run_on_a_run_leaves_arrays_with_the_first(made, tmp_path):
  start, run = made
  second = save(tmp_path / 'second', run, (1, 2))
  named = checkpoint.read_run(second / 'checkpoints/2')['base']
  assert named['path'] == os.path.abspath(start)
  shutil.rmtree(run)
  same(checkpoint.load_parameters(second, abstract().params), state(2).params)


def test_a_run_can_be_made_whole_and_old_runs_stay_so(made, tmp_path):
  start, run = made
  manager = open_at(run / 'checkpoints', start, whole=True)
  manager.restore(abstract())
  assert manager.base is None
  manager.save(state(2), 'place 2')
  manager.wait()
  manager.close()
  shutil.rmtree(start)
  same(checkpoint.load_parameters(run, abstract().params), state(2).params)
  manager = open_at(run / 'checkpoints', start)
  same(manager.restore(abstract())[0], state(2))
  assert manager.base is None
  manager.close()


@pytest.mark.long
def test_run_and_base_may_lie_in_a_bucket(bucket):
  place = paths.expand(f'{bucket}/things')
  start = put(place / 'base')
  run = save(place / 'run', start)
  same(restore(run, start)[0], state(1))
  same(checkpoint.load_parameters(run, abstract().params), state(1).params)
  paths.move_folder(start, place / 'moved')
  with pytest.raises(base.NoBase, match='its base is not at'):
    checkpoint.load_parameters(run, abstract().params)
  note = run / 'checkpoints/base.txt'
  paths.write_bytes(note, f'{bucket}/things/moved'.encode())
  same(checkpoint.load_parameters(run, abstract().params), state(1).params)


def test_what_differs_from_the_start_is_written(tmp_path):
  start = put(tmp_path / 'base', 3)
  arrays = records(state(0).params, 'params')
  assert base_for(start, arrays, [FROZEN]) is None
