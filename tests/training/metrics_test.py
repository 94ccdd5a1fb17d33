"""The record of a run: whole lines, no step twice, plain JSON."""

import errno
import json
import math
import struct
import sys
import types

import pytest

from gated_jax.config import RunConfig
from gated_jax.evals import metric_files
from gated_jax.training import metrics


def open_at(folder, after=0, **settings):
  return metrics.Metrics(folder, RunConfig(**settings), after)


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
  first = open_at(tmp_path)
  for step in range(1, 6):
    first.write(step, {'loss': 1 / step})
  first.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('[2]\n{"step": "2"}\n{"loss": 1}\n')  # somebody else's
    file.write('{"step": 6, "lo')  # a kill in the middle of a line
  second = open_at(tmp_path, after=3)
  second.write(4, {'loss': 9.0})
  second.close()
  records = metric_files.read(tmp_path / 'metrics.jsonl')
  assert [r['step'] for r in records] == [1, 2, 3, 4]
  assert [r['loss'] for r in records] == [1.0, 0.5, 1 / 3, 9.0]


def test_a_finished_run_started_again_writes_nothing_twice(tmp_path):
  first = open_at(tmp_path)
  first.write(4, {'loss': 1.0})
  first.write(4, {'validation/loss': 2.0})
  first.close()
  before = (tmp_path / 'metrics.jsonl').read_text()
  again = open_at(tmp_path, after=4)
  again.write(4, {'validation/loss': 2.0})
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  again.write(4, {'sink/mean': 0.5})  # not measured the first time
  again.write(5, {'validation/loss': 1.5})
  again.close()
  assert metric_files.read(tmp_path / 'metrics.jsonl')[2:] == [
    {'step': 4, 'sink/mean': 0.5},
    {'step': 5, 'validation/loss': 1.5},
  ]


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
  writer.write(1, {'loss': 2.7182817, 'grad_norm': math.nan})
  writer.close()
  (path,) = (tmp_path / 'tensorboard').glob('events*')
  raw = path.read_bytes()
  # A protocol buffer: the tag as text, the value as four bytes after it.
  tag = raw.index(b'loss')
  assert struct.pack('<f', 2.7182817) in raw[tag : tag + 16]
  assert b'grad_norm' not in raw, 'there is no number to draw'


def test_a_full_disk_costs_tensorboard_and_not_the_run(
  tmp_path, caplog, monkeypatch
):
  pytest.importorskip('tensorboardX')
  writer = open_at(tmp_path, tensorboard=True)
  real = writer._tensorboard._file._writer

  class Full:
    def write(self, data):
      raise OSError(errno.ENOSPC, 'No space left on device')

    def close(self):
      real.close()
      raise OSError(errno.ENOSPC, 'No space left on device')

  writer._tensorboard._file._writer = Full()
  for step in range(3):
    writer.write(step, {'loss': 1.0})
  writer.close()
  assert [r.getMessage() for r in caplog.records] == [
    'TensorBoard gets no more numbers: No space left on device'
  ]
  assert len(metric_files.read(tmp_path / 'metrics.jsonl')) == 3


class FakeWandb(types.ModuleType):
  """Remembers what the real one would be told."""

  def __init__(self, fails=''):
    super().__init__('wandb')
    self.fails, self.runs, self.logged, self.finished = fails, [], [], 0

  def init(self, **settings):
    if self.fails:
      raise type('UsageError', (Exception,), {})(self.fails)
    self.runs.append(settings)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


def test_wandb_gets_the_same_numbers_and_the_settings(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  writer = open_at(tmp_path, wandb='gates')
  writer.write(1, {'loss': 2.0})
  writer.close()
  assert fake.logged == [(1, {'loss': 2.0})]
  assert fake.finished == 1
  (run,) = fake.runs
  assert run['project'] == 'gates'
  assert run['config']['model']['gate']['position'] == 'sdpa_output'


def test_a_resumed_run_is_the_same_there_and_another_folder_is_not(
  tmp_path, monkeypatch
):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  # The same last name: it is no identity.
  for name in ('a/run:1', 'a/run:1', 'b/run:1'):
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    open_at(tmp_path / name, wandb='gates').close()
  first, again, other = (run['id'] for run in fake.runs)
  assert first == again != other
  assert all(run['resume'] == 'allow' for run in fake.runs)
  assert first.isalnum(), 'a colon, say, would be refused'


def test_wandb_that_refuses_is_one_line(tmp_path, monkeypatch):
  fake = FakeWandb(fails='api_key not configured\nlog in')
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  with pytest.raises(ValueError) as error:
    open_at(tmp_path, wandb='gates')
  assert str(error.value) == "wandb='gates': api_key not configured log in"


@pytest.mark.parametrize(
  ('package', 'settings'),
  [('tensorboardX', {'tensorboard': True}), ('wandb', {'wandb': 'project'})],
)
def test_a_missing_logger_is_named(tmp_path, monkeypatch, package, settings):
  for name in {package, *sys.modules}:
    if name.partition('.')[0] == package:
      monkeypatch.setitem(sys.modules, name, None)
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
