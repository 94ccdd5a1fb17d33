"""Sweeps start what is left, one run a device, and stop in order."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from gated_jax import cli
from gated_jax import paths
from gated_jax.evals import sweep

ROOT = pathlib.Path(__file__).parents[2]

# Stands for train.py: a loss a step, resumed from a count in its folder.
TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])
folder, words = pathlib.Path(flags['workdir']), flags['config'].split(':')[1]
saved = folder / 'saved'
stop = []
if '://' in flags['workdir']:
  print('a start')
  sys.exit('error: loss or gradient was not finite in 10 steps in a row')
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with (folder / 'starts').open('a') as file:
  file.write(os.environ['CUDA_VISIBLE_DEVICES'] + flags.get('extra', '') + ' ')
if words == 'bad':
  sys.exit('error: data.paths matches nothing')
if words == 'diverges':
  sys.exit('error: loss or gradient was not finite in 10 steps in a row')
metrics = (folder / 'metrics.jsonl').open('a')
step = int(saved.read_text()) if saved.exists() else 0
while step < 3:
  step += 1
  while words == 'slow' and step == 2 and not stop:
    time.sleep(0.05)
  if stop:
    saved.write_text(str(step))
    sys.exit(75)
  metrics.write(json.dumps({'step': step, 'loss': 2.0}) + chr(10))
  metrics.flush()
metrics.write(json.dumps({'step': step, 'validation/loss': 1.5}) + chr(10))
"""
CONFIG = """
import types
def runs(words):
  return words.split('+')
def about(words):
  return {'arm': words}
def get_config(words):
  space = types.SimpleNamespace
  return space(steps=3, model=space(depth=2), data=space(batch=4, length=8),
               optimizer=space(learning_rate=1e-3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A project with a training script that takes no time."""
  (tmp_path / 'train.py').write_text(TRAIN)
  (tmp_path / 'config.py').write_text(textwrap.dedent(CONFIG))
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  return tmp_path


def starts(folder, name):
  return (folder / 'runs' / name / 'starts').read_text().split()


def command(words, *more):
  return sweep.main([f'config.py:{words}', '--runs=runs', *more])


def test_every_run_ends_in_a_folder_of_its_own_on_a_device_of_its_own(
  folder, capsys
):
  code = command('a+b+c+a', '--devices=2', '--', '--extra=x')
  assert code == cli.DONE
  places = [starts(folder, name) for name in 'abc']
  assert places[:2] == [['0x'], ['1x']]
  assert places[2] in (['0x'], ['1x'])
  about = json.loads((folder / 'runs/a/run.json').read_text())
  assert (about['arm'], about['tokens_per_step']) == ('a', 32)
  assert about['config'] == 'config.py:a'
  printed = capsys.readouterr().out
  assert 'c: done' in printed
  assert printed.splitlines()[-1].split()[:3] == ['c', '3', '1.5000']


def test_done_and_diverged_runs_are_left_alone_and_failed_ones_are_not(
  folder, capsys
):
  assert command('a+bad+diverges') == cli.UNFINISHED
  assert command('a+bad+diverges') == cli.UNFINISHED
  assert [len(starts(folder, n)) for n in ('a', 'bad', 'diverges')] == [1, 2, 1]
  printed = capsys.readouterr().out
  assert 'a: done before' in printed
  assert 'diverges: diverged before' in printed
  assert 'bad: failed' in printed
  assert 'data.paths matches nothing' in printed


def test_what_runs_in_a_bucket_print_is_there(folder, bucket, capsys):
  log = paths.expand(f'{bucket}/runs/a/log.txt')
  paths.write_bytes(log, b'an earlier start\n')
  there = f'--runs={bucket}/runs'
  assert command('a', there) == cli.DONE
  first, second, last = paths.read_bytes(log).decode().splitlines()
  assert (first, second) == ('an earlier start', 'a start')
  assert 'not finite' in last
  about = json.loads(paths.read_bytes(log.with_name('run.json')))
  assert about['config'] == 'config.py:a'
  assert command('a', there) == cli.DONE
  assert 'a: diverged before' in capsys.readouterr().out


@pytest.mark.long
def test_a_spent_budget_saves_and_the_same_command_goes_on(folder):
  start = time.monotonic()
  assert command('slow', '--budget=2s') == cli.UNFINISHED
  assert time.monotonic() - start < 30
  saved = folder / 'runs/slow/saved'
  assert saved.read_text() == '2'
  (folder / 'train.py').write_text(TRAIN.replace("words == 'slow'", 'False'))
  assert command('slow') == cli.DONE
  assert starts(folder, 'slow') == ['0', '0']


def test_a_terminated_sweep_stops_its_runs(folder):
  (folder / 'runs/slow').mkdir(parents=True)
  process = subprocess.Popen(
    [sys.executable, '-m', 'gated_jax.evals.sweep', 'config.py:slow',
     '--runs=runs'],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.DEVNULL,
  )  # fmt: skip
  try:
    for _ in range(600):
      if (folder / 'runs/slow/metrics.jsonl').exists():
        break
      time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == cli.INTERRUPTED
  finally:
    process.kill()
  assert (folder / 'runs/slow/saved').exists()


def test_devices_come_from_what_the_user_can_see(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,6')
  places = [sweep.environment(i, 2) for i in range(2)]
  assert [p['CUDA_VISIBLE_DEVICES'] for p in places] == ['4', '6']
  assert [p['TPU_VISIBLE_CHIPS'] for p in places] == ['0', '1']
  with pytest.raises(ValueError, match='more than the 2 GPUs'):
    sweep.environment(2, 3)


def test_cores_are_shared_out_and_nobody_is_without():
  every = os.sched_getaffinity(0)
  shares = [sweep.cores(i, 2) for i in range(2)]
  assert set.union(*shares) == every
  assert all(sweep.cores(i, 10 * len(every)) for i in (0, 5, 9))


@pytest.mark.parametrize(
  ('text', 'seconds'), [('90', 90), ('90s', 90), ('25m', 1500), ('2h', 7200)]
)
def test_budgets_have_units(text, seconds):
  assert sweep.duration(text) == seconds


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['config.py:a', '--budget=soon'], "--budget='soon' must be a time"),
    (['config.py:a', '--budget=-3m'], "--budget='-3m' must be a time"),
    (['config.py:a', '--devices=0'], '--devices=0 must be at least 1'),
    (['nothing.py:a'], "there is no config file 'nothing.py'"),
    (['train.py'], "'train.py' has no get_config"),
    ([], 'the following arguments are required'),
  ],
)
def test_commands_that_mean_nothing_are_one_line(
  folder, capsys, arguments, message
):
  (folder / 'train.py').write_text('')
  assert cli.run(lambda: sweep.main(arguments)) == cli.REFUSED
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert message in error


def test_runs_of_the_evidence_are_listed(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert sweep.main(['configs/evidence.py:sinks,headwise', '--list']) == 0
  assert capsys.readouterr().out.split() == [
    f'configs/evidence.py:sinks,headwise,{seed}' for seed in range(3)
  ]
