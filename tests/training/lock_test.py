"""One run in one workdir: who holds the lock is named, and the dead hold none."""

import errno
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from gated_jax.training import lock

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.02)
  monkeypatch.setattr(lock, 'PATIENCE', 0.4)


def held(workdir):
  """What is said while the lock is taken and given back."""
  said = []
  with lock.locked(workdir, said.append):
    pass
  return said


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, quick):
  with (
    lock.locked(tmp_path, print),
    pytest.raises(lock.WorkdirInUse) as error,
  ):
    held(tmp_path)
  assert re.match(
    rf'{tmp_path} is in use by process {os.getpid()} on '
    rf'{socket.gethostname()} since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\S+: ',
    str(error.value),
  )
  assert held(tmp_path) == [], 'and may go on once that has ended'


HOLD = """
import pathlib, sys, time
from gated_jax.training import lock
with lock.locked(pathlib.Path(sys.argv[1]), print):
  print('held', flush=True)
  time.sleep(600)
"""


def test_another_process_blocks_until_it_is_dead_however_it_died(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  with pytest.raises(lock.WorkdirInUse, match=f'process {process.pid} on '):
    held(tmp_path)
  process.kill()
  process.communicate()
  assert held(tmp_path) == []


def left_by(workdir, **holder):
  path = workdir / lock.NAME
  path.write_text(json.dumps({'process': 7, 'held': True, **holder}))
  return path


def test_another_hosts_lock_blocks_only_while_it_changes(
  tmp_path, quick, monkeypatch
):
  path = left_by(tmp_path, host='elsewhere', beat=0)
  (said,) = held(tmp_path)
  assert said.startswith(f'{path} was left by process 7 on elsewhere: waiting')
  left_by(tmp_path, host='elsewhere', beat=0)
  real, beats = lock.time.sleep, iter(range(1, 9))

  def sleep(seconds):
    real(seconds)
    left_by(tmp_path, host='elsewhere', beat=next(beats))

  monkeypatch.setattr(lock.time, 'sleep', sleep)
  with pytest.raises(lock.WorkdirInUse, match='process 7 on elsewhere since'):
    held(tmp_path)


@pytest.mark.parametrize(
  'text', ['', '{', '[]', '{"held": false, "host": "elsewhere"}']
)
def test_a_lock_that_was_given_back_or_says_nothing_is_taken(tmp_path, text):
  (tmp_path / lock.NAME).write_text(text)
  assert held(tmp_path) == []


def test_a_file_system_without_locks_goes_by_the_process(
  tmp_path, quick, monkeypatch
):
  def flock(file, operation):
    raise OSError(errno.ENOTSUP, 'not supported')

  monkeypatch.setattr(lock.fcntl, 'flock', flock)
  left_by(tmp_path, host=socket.gethostname(), process=2**22 + 1, started='5')
  assert held(tmp_path) == []
  with lock.locked(tmp_path, print), pytest.raises(lock.WorkdirInUse):
    held(tmp_path)
