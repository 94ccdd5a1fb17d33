"""Whole runs of a tiny model, in processes of their own."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types

import fsspec
import numpy as np
import pytest

from gated_jax.evals import metric_files
from gated_jax.training.speed import Speed
from tests.training import tiny

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
# Most of a tiny run is compilation, and most runs here compile the same.
COMPILED = tempfile.TemporaryDirectory()
TINY = tiny.TINY | {'optimizer.accumulate': 2}


def environment():
  return {
    **os.environ,
    'XLA_FLAGS': '',
    'JAX_PLATFORMS': 'cpu',
    # Seconds of compilation for a model that takes milliseconds.
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': COMPILED.name,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(workdir, **settings):
  """Starts train.py; names with '__' for '.'."""
  chosen = TINY | {k.replace('__', '.'): v for k, v in settings.items()}
  return subprocess.Popen(
    [
      sys.executable,
      'train.py',
      '--config=configs/base.py',
      f'--workdir={workdir}',
      *(f'--config.{name}={value}' for name, value in chosen.items()),
    ],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait(process):
  out, err = process.communicate(timeout=240)
  return process.returncode, out, err


def losses(workdir):
  records = metric_files.read(workdir / 'metrics.jsonl')
  found = [(r['step'], r['loss']) for r in records if 'loss' in r]
  steps = [step for step, _ in found]
  assert steps == sorted(set(steps)), 'a step stands there twice'
  return dict(found)


def fingerprint(workdir, step):
  path = workdir / 'checkpoints' / str(step) / 'run' / 'metadata'
  return json.loads(path.read_text())['arrays']


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('reference')
  code, out, err = wait(
    start(workdir, figures=True, profile_start=5, profile_steps=2)
  )
  assert code == 0, out + err
  return workdir, out, err


def test_a_run_ends_with_what_to_know_and_what_to_type(reference):
  workdir, out, err = reference
  assert list(losses(workdir)) == list(range(1, 13))
  assert not err, 'nothing alarming on standard error'
  for pattern in (
    r'validation loss +\d\.\d+ nats',
    r'bits per byte +\d\.\d+',
    r'first-token attention +\d\.\d+',
    r'largest activation +\d+\.\d+',
    r'mean gate +0\.\d+',
    r'tokens/s +[\d,]+',
    rf'checkpoint +{re.escape(str(workdir))}/checkpoints/12',
    r'python -m gated_jax.decode --checkpoint=\S+ .?--prompt=\S',
    r'python train.py --config=configs/base.py .*--config.steps=24',
  ):
    assert re.search(pattern, out), pattern
  records = metric_files.read(workdir / 'metrics.jsonl')
  names = set().union(*records)
  assert {
    'loss',
    'grad_norm',
    'learning_rate',
    'tokens_per_second',
    'time/data',
    'time/compile',
    'time/checkpoint',
    'validation/loss',
  } <= names
  assert 'mfu' not in names, 'nobody knows the peak of this CPU'
  drawn = {path.name for path in (workdir / 'figures').iterdir()}
  names = ('loss', 'sink', 'gate', 'activation', 'attention')
  assert drawn == {'report.html', *(f'{name}.png' for name in names)}
  assert list(workdir.glob('profile/**/*.xplane.pb'))


@pytest.mark.parametrize(('reading', 'lines'), [(150.0, 1), (201.0, 0), (0, 0)])
def test_data_that_hardly_keeps_up_is_reported_once(reading, lines):
  said = []
  speed = Speed.__new__(Speed)
  speed._run = types.SimpleNamespace(
    data=types.SimpleNamespace(tokens_per_second=reading),
    console=types.SimpleNamespace(say=said.append),
  )
  speed._parts, speed._compared = 1, False
  for _ in range(3):
    speed._compare_with_data(100.0)
  assert len(said) == lines
  assert all('150 tokens/s' in line and '100' in line for line in said)


@pytest.mark.nightly
def test_what_it_says_to_type_can_be_typed(reference, tmp_path):
  workdir, out, _ = reference
  mine = tmp_path / 'mine'
  shutil.copytree(workdir, mine)

  def typed(pattern, text):
    """The output of a command that was printed, in another folder."""
    (line,) = re.findall(pattern, text, flags=re.MULTILINE)
    return subprocess.run(
      shlex.split(line.replace(str(workdir), str(mine))),
      cwd=ROOT,
      env=environment(),
      capture_output=True,
      text=True,
      check=True,
    ).stdout

  sample = re.search(r"--prompt=([^'\n]*)", out)[1]
  assert typed(r'^sample from it +(.*)$', out).startswith(sample)
  assert 'resuming after step 12' in typed(r'^resume it +(.*)$', out)
  assert list(losses(mine)) == list(range(1, 25))
  code, _, err = wait(start(mine, optimizer__learning_rate=1e-3))
  assert code == 2
  (line,) = err.splitlines()
  assert 'learning_rate is 0.0003 there and 0.001 here' in line
  assert 'resuming' not in typed(
    r'start a new run from these weights: (.*)', err
  )
  new = tmp_path / 'mine_2'
  # The same batch and noise, but not the weights of a beginning.
  assert losses(new)[1] != losses(mine)[1]


def kill_when(process, happened):
  """SIGKILL as soon as `happened`; False if the run ended before."""
  while process.poll() is None:
    if happened():
      process.send_signal(signal.SIGKILL)
      process.communicate()
      return True
    time.sleep(0.001)
  return False


def test_a_killed_run_goes_on_to_the_bit(reference, tmp_path):
  workdir, _, _ = reference
  folder = tmp_path / 'checkpoints'

  def saving(after):
    """A folder half written, with at least this many whole ones."""
    names = [p.name for p in folder.glob('*')] if folder.is_dir() else []
    whole = [int(n) for n in names if n.isdigit()]
    return len(names) > len(whole) and max(whole, default=0) >= after

  def logged():
    path = tmp_path / 'metrics.jsonl'
    return path.exists() and '"step": 7' in path.read_text()

  assert kill_when(start(tmp_path), lambda: saving(2))
  assert kill_when(start(tmp_path), logged)
  code, out, err = wait(start(tmp_path))
  assert code == 0, out + err
  assert 'resuming after step' in out
  assert losses(tmp_path) == losses(workdir)
  assert fingerprint(tmp_path, 12) == fingerprint(workdir, 12)


def test_sigterm_saves_and_no_other_run_comes_in_between(reference, tmp_path):
  workdir, _, _ = reference
  process = start(tmp_path, steps=100_000, checkpoint__every=0, eval_every=0)
  path = tmp_path / 'metrics.jsonl'
  while not (path.exists() and path.stat().st_size):
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  code, out, err = wait(start(tmp_path))
  assert (code, out) == (75, '')
  (line,) = err.splitlines()
  assert f'{tmp_path} is in use by process {process.pid} on' in line
  process.send_signal(signal.SIGTERM)
  code, out, err = wait(process)
  assert (code, err) == (75, ''), out + err
  last = out.splitlines()[-1]
  assert re.match(r'SIGTERM: saved step (\d+) in \S+; go on with: ', last)
  step = re.match(r'SIGTERM: saved step (\d+)', last)[1]
  assert (tmp_path / 'checkpoints' / step / 'params').is_dir()
  # Same batches and noise; the schedule differs, and warm-up does not.
  assert losses(tmp_path)[1] == losses(workdir)[1]


def test_a_run_that_turns_non_finite_stops_and_says_where(tmp_path):
  code, out, err = wait(
    start(
      tmp_path,
      optimizer__learning_rate=1e38,
      max_bad_steps=3,
      # With ids that the tokenizer does not have.
      data__source='synthetic',
      model__vocab=320,
    )
  )
  assert code == 1, out + err
  (line,) = err.splitlines()
  assert re.search(r'not finite in 3 steps in a row, \d+ to \d+', line)
  assert re.search(r'the last good checkpoint is \S+/checkpoints/\d+', line)
  assert 'update skipped' in out


def test_data_that_cannot_be_used_costs_no_step_that_was_made(tmp_path):
  # Ids are checked as a file is read, so the bad one lies in the second file.
  ids = np.tile(np.append(np.arange(49), 256), 30)
  np.save(tmp_path / 'a.npy', ids)
  ids[0] = 257
  np.save(tmp_path / 'b.npy', ids)
  code, out, err = wait(
    start(
      tmp_path / 'run',
      data__source='tokens',
      data__paths=tmp_path / '*.npy',
      data__eos=256,
      data__shuffle=False,
      data__shuffle_tokens=128,
      data__validation=0,
      checkpoint__every=0,
    )
  )
  assert code == 2, out + err
  (line,) = err.splitlines()
  found = re.search(r'token id 257 in (\S+) .*; step (\d+) is saved in', line)
  assert found, line
  assert found[1] == str(tmp_path / 'b.npy')
  assert int(found[2]) > 4, '1500 tokens are eleven steps'
  assert (tmp_path / 'run' / 'checkpoints' / found[2] / 'params').is_dir()


@pytest.mark.parametrize(
  'change',
  # The library asks again for half a minute.
  ['removed', pytest.param('unreachable', marks=pytest.mark.nightly)],
)
def test_data_in_a_bucket_that_goes_away_costs_no_step_that_was_made(
  tmp_path, bucket, storage, change
):
  ids = np.tile(np.append(np.arange(49), 256), 30)
  np.save(tmp_path / 'a.npy', ids)
  for name in ('a.npy', 'b.npy'):
    fsspec.filesystem('gs').put_file(tmp_path / 'a.npy', f'{bucket}/{name}')
  settings = {
    'data__source': 'tokens',
    'data__paths': f'{bucket}/*.npy',
    'data__eos': 256,
    'data__shuffle_tokens': 128,
    'data__validation': 0,
  }
  process = start(tmp_path / 'run', steps=10**6, **settings)
  lines = tmp_path / 'run/metrics.jsonl'
  while not (lines.exists() and losses(tmp_path / 'run')):
    assert process.poll() is None, process.communicate()
    time.sleep(0.1)
  if change == 'removed':
    storage.proxy.fail('GET /download.*b.npy', status=404)
  else:
    storage.proxy.fail('GET /download', status=503)
  code, out, err = wait(process)
  storage.proxy.heal()
  (line,) = err.splitlines()
  found = re.search(r'step (\d+) is saved in', line)
  assert found, line
  if change == 'removed':
    assert code == 2, out + err
    assert f'{bucket}/b.npy has changed since the run began' in line
    return
  # Nothing is wrong with the files: the same command may be run again.
  assert code == 75, out + err
  assert f'{bucket}/' in line and '503' in line
