"""Checkpoints in a bucket: whole by their mark, and as good as on a disk."""

import os

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax import paths
from gated_jax.checkpoint.folder import COMMIT
from gated_jax.checkpoint.folder import steps_in
from gated_jax.config import CheckpointConfig
from gated_jax.config import RunConfig
from tests.training.checkpoints_test import abstract
from tests.training.checkpoints_test import open_at
from tests.training.checkpoints_test import saved
from tests.training.checkpoints_test import state_at


@pytest.fixture
def folder(bucket):
  """A place for three steps, of which two are kept and the best."""
  folder = paths.expand(f'{bucket}/run/checkpoints')
  config = CheckpointConfig(keep_last=2, keep_best=1)
  assert saved(folder, [1.0, 2.0, 3.0, 4.0], checkpoint=config) == [1, 3, 4]
  return folder


def names(folder):
  return {os.fspath(path) for path in paths.files_below(folder)}


def restored(folder):
  """The step that is taken, and what is said."""
  said = []
  manager = open_at(folder, said.append)
  state, place, _ = manager.restore(abstract())
  manager.close()
  step = int(state.step)
  assert place == f'place {step}'
  for here, there in zip(
    jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True
  ):
    np.testing.assert_array_equal(here, there)
  return step, said


def test_a_state_comes_back_to_the_bit(folder):
  assert restored(folder) == (4, [])
  run = folder.parent
  assert checkpoint.find(run) == folder / '4'
  checkpoint.load_parameters(run, abstract().params)


def test_a_save_that_was_killed_is_no_step(folder):
  (folder / '4' / COMMIT).unlink()
  assert checkpoint.find(folder) == folder / '3'
  assert restored(folder) == (3, [])
  assert not paths.exists(folder / '4'), 'and it is removed'


def test_a_step_that_was_half_removed_goes(folder):
  lost = sorted(p for p in paths.files_below(folder / '1/rest'))[-1]
  lost.unlink()
  assert restored(folder) == (4, [])
  assert steps_in(folder) == [3, 4]
  assert not paths.exists(folder / '1')


def test_a_list_of_files_that_was_not_written_is_made_up_for(folder):
  (folder / '4/files.json').unlink()
  manager = open_at(folder)
  manager.restore(abstract())
  manager.wait()
  manager.close()
  assert restored(folder) == (4, [])
  assert f'{folder}/4/files.json' in names(folder)


@pytest.mark.parametrize('how', ['changed', 'removed'])
def test_a_damaged_step_is_named_and_put_aside(folder, how):
  (path,) = [p for p in paths.files_below(folder / '4') if p.name == 'metadata']
  if how == 'changed':
    paths.write_bytes(path, paths.read_bytes(path)[:-9])
  else:
    path.unlink()
  step, (said,) = restored(folder)
  assert step == 3
  assert f'{folder}/4 is damaged in run/metadata' in said
  assert 'it is now damaged-4' in said
  assert paths.exists(folder / 'damaged-4/params/manifest.ocdbt')
  assert not paths.exists(folder / '4')


def test_parameters_alone_go_to_a_bucket_and_come_back(bucket):
  params = state_at(5).params
  place = f'{bucket}/imported'
  checkpoint.save_parameters(place, params, RunConfig())
  back = checkpoint.load_parameters(place, abstract().params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with pytest.raises(ValueError, match=f'{place} exists'):
    checkpoint.save_parameters(place, params, RunConfig())
  with pytest.raises(ValueError, match='there is no bucket gs://nobodys'):
    checkpoint.load_config('gs://nobodys-bucket/x')
  with pytest.raises(ValueError, match=f'no checkpoint at {bucket}/other'):
    checkpoint.load_config(f'{bucket}/other')
