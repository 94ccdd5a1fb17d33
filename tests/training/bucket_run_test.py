"""Whole runs in a bucket: the numbers of a run on a disk, also after kills."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from gated_jax import paths
from gated_jax.checkpoint.folder import RUN
from gated_jax.checkpoint.folder import steps_in
from gated_jax.evals import compare
from gated_jax.evals import metric_files
from gated_jax.training.workdir import check_workdir
from tests.storage.proxy import CUT
from tests.storage.proxy import LOST
from tests.storage.proxy import SILENT
from tests.storage.proxy import STALL
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def program(storage, tmp_path_factory):
  """Starts a program of the project: its words, settings as in `tiny.py`."""
  environment = {
    **os.environ,
    **storage.environment,
    'XLA_FLAGS': '',
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }

  def start(*words, **settings):
    chosen = {k.replace('__', '.'): v for k, v in settings.items()}
    return subprocess.Popen(
      [
        sys.executable,
        *words,
        *(f'--config.{name}={value}' for name, value in chosen.items()),
      ],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope='module')
def train(program):
  """Starts train.py in a workdir."""

  def start(workdir, **settings):
    words = ('train.py', '--config=configs/base.py', f'--workdir={workdir}')
    return program(*words, **tiny.TINY | settings)

  return start


def ended(process, code=0):
  """Output and errors of a program that ends as it should."""
  out, err = process.communicate(timeout=240)
  assert process.returncode == code, out + err
  return out, err


def losses(workdir):
  records = metric_files.read(paths.expand(workdir) / metric_files.NAME)
  found = [(r['step'], r['loss']) for r in records if 'loss' in r]
  steps = [step for step, _ in found]
  assert steps == sorted(set(steps)), 'a step stands there twice'
  return dict(found)


def fingerprint(workdir, step):
  folder = paths.expand(workdir) / f'checkpoints/{step}'
  return json.loads(paths.read_bytes(folder / RUN))['arrays']


def left_in(workdir):
  """Losses, the steps that were kept and the arrays of the last one."""
  folder = paths.expand(workdir) / 'checkpoints'
  steps = steps_in(folder)
  return losses(workdir), steps, fingerprint(workdir, 12)


@pytest.fixture(scope='module')
def reference(train, tmp_path_factory):
  """What a run on a disk left that nothing happened to."""
  workdir = tmp_path_factory.mktemp('reference')
  ended(train(workdir))
  return left_in(workdir)


@pytest.mark.parametrize(
  ('workdir', 'words'),
  [
    ('gs://absent-bucket/x', 'there is no bucket gs://absent-bucket'),
    ('gs://forbidden-bucket/x', 'no permission'),
    ('gs://b/x', 'the bucket refuses: Invalid bucket name'),
    ('{bucket}/object', 'is an object: a folder is needed'),
  ],
)
def test_a_workdir_that_cannot_be_is_refused_at_once(workdir, words, bucket):
  paths.write_bytes(paths.expand(f'{bucket}/object'), b'')
  with pytest.raises(ValueError, match=words) as error:
    check_workdir(paths.expand(workdir.format(bucket=bucket)))
  assert len(str(error.value).splitlines()) == 1


def test_a_bucket_that_cannot_be_written_to_is_refused(bucket, storage):
  storage.proxy.fail('POST', status=403)
  with pytest.raises(ValueError, match=f'cannot write to workdir {bucket}/x: '):
    check_workdir(paths.expand(f'{bucket}/x'))


@pytest.mark.nightly
def test_a_run_in_a_bucket_is_the_run_on_a_disk(
  program, train, reference, bucket, storage
):
  workdir = f'{bucket}/runs/one'
  for status, after in ((503, 40), (429, 90), (CUT, 120), (503, 200)):
    storage.proxy.fail('.*', status=status, times=2, after=after)
  settings = {'profile_start': 5, 'profile_steps': 1, 'tensorboard': True}
  out, _ = ended(train(workdir, figures=True, **settings))
  assert storage.proxy.struck()
  assert left_in(workdir) == reference
  names = {
    str(p).removeprefix(f'{workdir}/')
    for p in paths.files_below(paths.expand(workdir))
  }
  drawn = {name for name in names if name.startswith('figures/')}
  assert {'figures/report.html', 'figures/loss.png'} <= drawn
  assert 'probe.json' in names
  assert any(name.startswith('tensorboard/events') for name in names)
  assert any(name.endswith('.xplane.pb') for name in names)
  assert re.search(
    rf'^checkpoint +{workdir}/checkpoints/12$', out, re.MULTILINE
  )

  decode = ('-m', 'gated_jax.decode', f'--checkpoint={workdir}', '--prompt=The')
  assert ended(program(*decode))[0].startswith('The')
  figures = f'{bucket}/measured'
  evals = ('-m', 'gated_jax.evals', f'--checkpoint={workdir}')
  assert 'perplexity' in ended(program(*evals, f'--figures={figures}'))[0]
  assert paths.exists(paths.expand(figures) / 'sink.png')
  ended(train(f'{bucket}/runs/two', steps=2, init_from=workdir))
  compare.main([f'{bucket}/runs', f'--out={bucket}/both'])
  text = paths.read_bytes(paths.expand(f'{bucket}/both/comparison.md')).decode()
  assert '| one |' in text
  assert '| two |' in text


@pytest.mark.long
def test_a_killed_run_in_a_bucket_goes_on_to_the_bit(
  train, reference, bucket, storage
):
  killed = kill_often(train, f'{bucket}/x', storage.proxy, 2)
  assert killed == 2
  assert left_in(f'{bucket}/x') == reference


@pytest.mark.nightly
def test_ten_kills_cost_nothing(train, reference, bucket, storage):
  assert kill_often(train, f'{bucket}/x', storage.proxy, 10) == 10
  assert left_in(f'{bucket}/x') == reference


def kill_often(train, workdir, proxy, times):
  """Kills a run that often, each time after other requests; how often."""
  killed = 0
  for number in range(times):
    begun = len(proxy.requests)
    # A start asks some dozens of times before its first step, a save more.
    most = 60 + 37 * number
    process = train(workdir)
    while process.poll() is None and len(proxy.requests) < begun + most:
      time.sleep(0.001)
    killed += process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
  ended(train(workdir))
  return killed


# Requests in whose midst a run is killed, and how many of them pass before.
SENT = 'POST .*uploadType=media.*checkpoints'  # arrays of a checkpoint
KILLED_IN = (
  (SENT, SILENT, 0),
  (SENT, LOST, 3),
  (r'POST .*upload_id=.*checkpoints/\d+/run/', SILENT, 0),
  (r'POST .*upload_id=.*checkpoints/\d+/params/commit_success', SILENT, 1),
  (r'POST .*upload_id=.*checkpoints/\d+/commit_success', SILENT, 0),
  (r'POST .*upload_id=.*checkpoints/\d+/commit_success', LOST, 0),
  (r'POST .*metrics\.jsonl/\d+/000000', SILENT, 0),
  (r'POST .*metrics\.jsonl/\d+/000000', LOST, 0),
  (r'DELETE .*metrics\.jsonl', SILENT, 0),
  (r'POST .*metrics\.jsonl/\d+/000001', SILENT, 0),
  (r'POST .*metrics\.jsonl/\d+/000001', LOST, 1),
  (r'DELETE .*checkpoints', LOST, 0),
  (r'DELETE .*checkpoints', SILENT, 2),
)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_kills_during_uploads_cost_nothing(train, reference, bucket, storage):
  workdir = f'{bucket}/x'
  for pattern, fault, after in KILLED_IN:
    storage.proxy.fail(pattern, status=fault, times=1, after=after)
    process = train(workdir)
    while not storage.proxy.struck():
      assert process.poll() is None, (pattern, process.communicate())
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    storage.proxy.heal()
  ended(train(workdir))
  assert left_in(workdir) == reference


# train.py, to which two seconds without a byte are enough.
HASTY = """
import runpy
from gated_jax import paths
paths.PATIENCE = 2
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.nightly
@pytest.mark.parametrize('fault', [SILENT, STALL, LOST])
def test_requests_that_are_never_answered_change_nothing(
  program, reference, bucket, storage, fault
):
  workdir = f'{bucket}/x'
  for pattern in (
    r'GET .*checkpoints',
    r'POST .*uploadType=media.*checkpoints/4',
    r'POST .*metrics.jsonl',
    r'POST .*upload_id=.*checkpoints/6/commit_success',
    r'DELETE .*checkpoints',
  ):
    storage.proxy.fail(pattern, fault, times=2)
  words = ('-c', HASTY, '--config=configs/base.py', f'--workdir={workdir}')
  ended(program(*words, **tiny.TINY))
  assert storage.proxy.struck()
  assert left_in(workdir) == reference


@pytest.mark.nightly
def test_a_bucket_that_goes_silent_ends_the_run_in_one_line(
  program, reference, bucket, storage
):
  workdir = f'{bucket}/x'
  # Of the first checkpoint everything arrives but the settings.
  storage.proxy.fail('POST .*checkpoints/2/run', SILENT)
  words = ('-c', HASTY, '--config=configs/base.py', f'--workdir={workdir}')
  _, err = ended(program(*words, **tiny.TINY), code=75)
  (line,) = [x for x in err.splitlines() if not x.startswith('E')]
  assert line == (
    f'error: could not save step 2: {workdir}/checkpoints: no answer in time, '
    'after several tries'
  )
  storage.proxy.heal()
  ended(program(*words, **tiny.TINY))
  assert left_in(workdir) == reference


@pytest.mark.nightly
def test_a_step_that_is_out_of_reach_is_not_put_aside(
  program, train, bucket, storage
):
  workdir = f'{bucket}/x'
  ended(train(workdir, steps=4))
  before = paths.files_below(paths.expand(f'{workdir}/checkpoints'))
  storage.proxy.fail('GET .*checkpoints/4/run/metadata', 503)
  words = ('-c', HASTY, '--config=configs/base.py', f'--workdir={workdir}')
  _, err = ended(program(*words, **tiny.TINY), code=75)
  assert 'error: gs://' in err and '503' in err, err
  storage.proxy.heal()
  assert before == paths.files_below(paths.expand(f'{workdir}/checkpoints'))


@pytest.mark.long
def test_two_runs_do_not_share_a_workdir(train, bucket):
  workdir = f'{bucket}/x'
  first = train(workdir, steps=100_000, checkpoint__every=0, eval_every=0)
  lock = paths.expand(workdir) / 'lock'
  while not paths.exists(lock):
    assert first.poll() is None, first.communicate()
    time.sleep(0.05)
  out, err = ended(train(workdir), code=75)
  (line,) = [x for x in err.splitlines() if x.startswith('error')]
  assert f'{workdir} is in use by process {first.pid} on' in line
  # Until it trains, nothing in it waits for a signal.
  assert any(line.startswith('step 1/') for line in first.stdout)
  first.send_signal(signal.SIGTERM)
  out, _ = ended(first, code=75)
  last = out.splitlines()[-1]
  step = re.match(r'SIGTERM: saved step (\d+) in gs://\S+; go on', last)[1]
  assert int(step) in steps_in(paths.expand(workdir) / 'checkpoints')
  assert list(losses(workdir)) == list(range(1, int(step) + 1))
