"""The lock of a workdir in a bucket: one holder, and the dead hold none."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import types

import pytest

from gated_jax import paths
from gated_jax.training import bucket_lock
from gated_jax.training import lock_holder
from gated_jax.training.bucket_lock import BucketLock
from gated_jax.training.lock import locked
from gated_jax.training.lock_holder import WorkdirInUse
from tests.storage.proxy import CUT


@pytest.fixture
def path(bucket, monkeypatch):
  monkeypatch.setattr(bucket_lock, 'BEAT', 0.02)
  monkeypatch.setattr(bucket_lock, 'PATIENCE', 0.3)
  return paths.expand(f'{bucket}/run/lock')


def held(path):
  """What is said while the lock is taken and given back."""
  said = []
  with locked(path.parent, said.append) as check:
    check()
  return said


def left_by(path, **holder):
  text = json.dumps({'process': 7, 'held': True, **holder})
  paths.write_bytes(path, text.encode())


def test_a_second_run_is_refused_and_told_of_the_first(path):
  with locked(path.parent, print), pytest.raises(WorkdirInUse) as error:
    held(path)
  assert re.match(
    rf'{path.parent} is in use by process {os.getpid()} on '
    rf'{socket.gethostname()} since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\S+: ',
    str(error.value),
  )
  assert held(path) == [], 'and may go on once that has ended'


def test_a_dead_process_of_this_host_holds_nothing(path):
  process = subprocess.run([sys.executable, '-c', ''], check=True)
  del process
  here = {'host': socket.gethostname(), 'boot': lock_holder._boot()}
  left_by(path, **here, process=2**22 + 1, started='5')
  assert held(path) == []


def test_another_hosts_lock_blocks_only_while_it_changes(path, monkeypatch):
  left_by(path, host='elsewhere', beat=0)
  (said,) = held(path)
  assert said.startswith(f'{path} was left by process 7 on elsewhere: waiting')
  left_by(path, host='elsewhere', beat=0)

  def sleep(seconds):
    del seconds
    left_by(path, host='elsewhere', beat=1)

  clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
  monkeypatch.setattr(bucket_lock, 'time', clock)
  with pytest.raises(WorkdirInUse, match='process 7 on elsewhere since'):
    held(path)


@pytest.mark.parametrize('text', [b'', b'{', b'[]', b'{"held": false}'])
def test_a_lock_that_was_given_back_or_says_nothing_is_taken(path, text):
  paths.write_bytes(path, text)
  assert held(path) == []


@pytest.mark.parametrize('left', [False, True])
def test_of_two_that_see_the_lock_free_one_gets_it(path, left, monkeypatch):
  if left:
    left_by(path, host='elsewhere')
  real = BucketLock._watch if left else BucketLock._read
  others = [lambda: left_by(path, host='faster')]

  def and_then_another(lock, *args):
    result = real(lock, *args)
    if others:
      others.pop()()
    return result

  name = '_watch' if left else '_read'
  monkeypatch.setattr(BucketLock, name, and_then_another)
  with pytest.raises(WorkdirInUse, match='process 7 on faster'):
    held(path)


def test_a_holder_that_lost_the_lock_is_told(path):
  with locked(path.parent, print) as check:
    check()
    left_by(path, host='elsewhere')
    time.sleep(0.1)
    with pytest.raises(WorkdirInUse, match='taken over by process 7 on else'):
      check()
  holder = json.loads(paths.read_bytes(path))
  assert holder['held'], 'what another run holds is not given back'


def test_an_answer_that_was_lost_does_not_cost_the_lock(path, storage):
  with locked(path.parent, print) as check:
    storage.proxy.fail('POST .*lock', status=CUT, times=1)
    while not storage.proxy.struck():
      time.sleep(0.01)
    time.sleep(1.5)  # TensorStore waits before it repeats
    check()
  assert held(path) == []
