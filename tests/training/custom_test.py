"""Runs with a caller's own optimizer, data and callbacks."""

import dataclasses
import json

import grain
import jax
import numpy as np
import optax
import pytest

from gated_jax.config import CheckpointConfig
from gated_jax.config import DataConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.training import loop
from gated_jax.training.custom import Custom
from gated_jax.training.custom import OwnData
from gated_jax.training.custom import checked

ROWS, LENGTH = 8, 8
MODEL = ModelConfig(
  vocab=16, depth=1, width=16, heads=2, kv_heads=1, head_dim=8,
  mlp_width=16, length=LENGTH,
)  # fmt: skip
CONFIG = RunConfig(
  model=MODEL,
  data=DataConfig(batch=ROWS, length=LENGTH),
  steps=6,
  optimizer=OptimizerConfig(warmup_steps=0),
  log_every=2,
  checkpoint=CheckpointConfig(every=3),
  figures=False,
)


def batch_of(number):
  ids = (np.arange(LENGTH + 1) * (number + 1) + np.arange(ROWS)[:, None]) % 16
  ones = np.ones((ROWS, LENGTH), np.int64)
  return {
    'tokens': ids[:, :-1],
    'targets': ids[:, 1:],
    'segments': ones,
    'positions': ones.cumsum(1) - 1,
    'weights': ones,
  }


def endless():
  number = 0
  while True:
    yield batch_of(number)
    number += 1


def grains():
  source = grain.MapDataset.range(100).map(batch_of)
  return iter(source.to_iter_dataset())


class Seen:
  """A callback that notes what it is told, and ends a run at a step."""

  def __init__(self, last=-1):
    self.losses, self.last, self.params = {}, last, None

  def __call__(self, progress):
    assert int(progress.state.step) == progress.step
    self.losses[progress.step] = progress.metrics['loss']
    self.params = jax.device_get(progress.state.params)
    return progress.step == self.last


def train(workdir, data, seen, steps=6, optimizer=None):
  return loop.run(
    dataclasses.replace(CONFIG, steps=steps),
    workdir,
    optimizer=optax.sgd(0.1) if optimizer is None else optimizer,
    data=data,
    held_out=[batch_of(50)],
    callbacks=[seen],
  )


# Whole runs take some seconds each.
@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder, seen = tmp_path_factory.mktemp('whole'), Seen()
  result = train(folder, endless(), seen)
  return folder, seen, result


@pytest.mark.long
def test_a_run_takes_what_it_is_given(whole):
  folder, seen, result = whole
  assert result.step == 6 and list(seen.losses) == [2, 4, 6]
  assert np.isfinite(result.validation.loss)
  lines = [json.loads(x) for x in (folder / 'metrics.jsonl').open()]
  logged = {x['step']: x['loss'] for x in lines if 'loss' in x}
  assert seen.losses == logged
  assert not any('learning_rate' in line for line in lines)


@pytest.mark.nightly
@pytest.mark.parametrize('data', [endless, grains])
def test_a_callback_ends_a_run_that_then_goes_on_to_the_bit(
  whole, tmp_path, data
):
  _, seen, _ = whole
  first, rest = Seen(last=4), Seen()
  assert train(tmp_path, data(), first).stopped_by == 'callback'
  assert train(tmp_path, data(), rest).step == 6
  assert {**first.losses, **rest.losses} == seen.losses
  jax.tree.map(np.testing.assert_array_equal, rest.params, seen.params)
  # Another optimizer is refused, and what was saved stays.
  with pytest.raises(ValueError, match='trained by another optimizer'):
    train(tmp_path, data(), Seen(), steps=7, optimizer=optax.adam(1e-3))
  assert (tmp_path / 'checkpoints/6').is_dir()


def test_data_begins_anew_or_its_end_is_said():
  again = OwnData([batch_of(0), batch_of(1)], CONFIG.data, ROWS)
  tokens = [next(again)['tokens'].sum() for _ in range(4)]
  assert tokens[:2] == tokens[2:]
  once = OwnData(iter([batch_of(0)]), CONFIG.data, ROWS)
  next(once)
  with pytest.raises(ValueError, match='ended after 1 batches'):
    next(once)


def test_positions_of_another_kind_are_refused():
  own = OwnData(endless(), CONFIG.data, ROWS)
  with pytest.raises(ValueError, match='is of the files of a config'):
    own.restore(b'{"about": {}, "batches": 3, "position": {}}')
  with_state = OwnData(grains(), CONFIG.data, ROWS)
  next(with_state)
  with pytest.raises(ValueError, match='has no set_state'):
    own.restore(with_state.state())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'targets': None}, 'a batch has the arrays positions, segments, tokens'),
    ({'labels': np.zeros(3)}, 'a batch has the arrays labels, positions'),
    (
      {'tokens': np.zeros((3, 8), int)},
      r'tokens of shape \[3, 8\], not \[8, 8\]',
    ),
    ({'tokens': np.zeros((8, 8))}, 'tokens of float64, not of integers'),
  ],
)
def test_a_batch_of_another_form_is_named(change, message):
  batch = {k: v for k, v in {**batch_of(0), **change}.items() if v is not None}
  with pytest.raises(ValueError, match=message):
    checked(batch, CONFIG.data, ROWS)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'optimizer': 'adam'}, "optimizer='adam' must be an optax"),
    ({'data': 3}, 'data=3 must be an iterable of batches'),
    ({'held_out': [1]}, 'held_out does nothing without data'),
    ({'callbacks': [3]}, 'callbacks has 3, which is no function'),
    ({'loss': 'kl'}, "loss='kl' must be a function"),
  ],
)
def test_what_is_no_part_of_a_run_is_named(wrong, message):
  with pytest.raises(ValueError, match=message):
    Custom(**wrong)
