"""The record of a run: whole lines, no step twice, plain JSON."""

import json
import math

import pytest

from gated_jax.config import RunConfig
from gated_jax.training import metrics


def open_at(folder, after=0, **settings):
  return metrics.Metrics(folder, RunConfig(**settings), after)


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
  first = open_at(tmp_path)
  for step in range(1, 6):
    first.write(step, {'loss': 1 / step})
  first.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "lo')  # a kill in the middle of a line
  second = open_at(tmp_path, after=3)
  second.write(4, {'loss': 9.0})
  second.close()
  records = metrics.read(tmp_path / 'metrics.jsonl')
  assert [r['step'] for r in records] == [1, 2, 3, 4]
  assert [r['loss'] for r in records] == [1.0, 0.5, 1 / 3, 9.0]


def test_numbers_that_are_none_are_null(tmp_path):
  writer = open_at(tmp_path)
  writer.write(1, {'loss': math.nan, 'grad_norm': math.inf, 'skipped': 2})
  writer.close()
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text) == {
    'step': 1,
    'loss': None,
    'grad_norm': None,
    'skipped': 2,
  }


def test_tensorboard_gets_the_same_numbers(tmp_path):
  pytest.importorskip('tensorboardX')
  writer = open_at(tmp_path, tensorboard=True)
  writer.write(1, {'loss': 2.0})
  writer.close()
  assert list((tmp_path / 'tensorboard').glob('events*'))


@pytest.mark.parametrize(
  ('package', 'settings'),
  [('tensorboardX', {'tensorboard': True}), ('wandb', {'wandb': 'project'})],
)
def test_a_missing_logger_is_named(tmp_path, monkeypatch, package, settings):
  monkeypatch.setitem(__import__('sys').modules, package, None)
  with pytest.raises(ValueError, match=f'pip install {package}'):
    open_at(tmp_path, **settings)


def test_utilisation_is_only_claimed_for_known_devices():
  assert metrics.utilisation(1e9, 1e5, 'cpu', 1) == 0
  assert metrics.utilisation(197e9, 1e3, 'TPU v5 lite', 2) == 0.5


def test_the_clock_keeps_laps_apart(monkeypatch):
  now = iter([0.0, 1.0, 3.0, 10.0, 12.0, 15.0])
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
  clock = metrics.Clock()
  with clock.spent('checkpoint'):
    pass
  assert clock.lap() == (10.0, {'checkpoint': 2.0})
  assert clock.lap() == (2.0, {})
  assert clock.total == {'checkpoint': 2.0}
  assert clock.seconds == 15.0
