"""The record of a run in a bucket is whole at any moment, and as on a disk."""

import contextlib
import json

import pytest

from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.evals import metric_files
from gated_jax.training import lines
from tests.storage.proxy import SILENT


def line(step):
  return json.dumps({'step': step, 'loss': 1 / step}) + '\n'


def steps(path):
  return [record['step'] for record in metric_files.read(path)]


@pytest.fixture(params=['disk', 'bucket'])
def path(request, tmp_path):
  if request.param == 'disk':
    (tmp_path / 'run').mkdir()
    return tmp_path / 'run' / metric_files.NAME
  bucket = request.getfixturevalue('bucket')
  return paths.expand(f'{bucket}/run/{metric_files.NAME}')


def test_what_was_saved_is_there_and_later_lines_are_dropped(path):
  assert steps(path) == []
  first = lines.lines_at(path, 0)
  for step in range(1, 6):
    first.add(line(step))
  first.save()
  assert steps(path) == [1, 2, 3, 4, 5]
  second = lines.lines_at(path, 3)
  assert [record['step'] for record in second.kept] == [1, 2, 3]
  assert steps(path) == [1, 2, 3]
  second.add(line(4))
  second.close()
  assert steps(path) == [1, 2, 3, 4]
  assert metric_files.runs_in(path.parent.parent) == [path.parent]


def test_parts_are_joined_in_their_order(bucket, monkeypatch):
  monkeypatch.setattr(lines, 'PART', 40)
  path = paths.expand(f'{bucket}/run/{metric_files.NAME}')
  writer = lines.lines_at(path, 0)
  for step in range(1, 24):
    writer.add(line(step))
    writer.save()
  assert steps(path) == list(range(1, 24))
  assert len(paths.files_below(path)) > 10


@pytest.mark.parametrize(
  ('status', 'reason'),
  [
    (503, '503'),
    pytest.param(SILENT, 'no answer in time', marks=pytest.mark.long),
  ],
)
def test_lines_come_on_a_schedule_and_wait_while_the_bucket_is_away(
  status, reason, bucket, storage, monkeypatch, caplog, at_once, impatient
):
  monkeypatch.setattr(lines, 'EVERY', 0.0)
  path = paths.expand(f'{bucket}/run/{metric_files.NAME}')
  writer = lines.lines_at(path, 0)
  writer.add(line(1))
  assert steps(path) == [1]
  storage.proxy.fail('POST', status=status)
  writer.add(line(2))
  (record,) = caplog.records
  assert record.getMessage().startswith('metrics wait to be written: gs://')
  with pytest.raises(BucketError, match=reason):
    writer.save(tries=1)
  storage.proxy.heal()
  writer.save()
  assert steps(path) == [1, 2]


@pytest.mark.parametrize('request_that_fails', range(4))
def test_a_start_that_dies_between_two_writes_loses_nothing(
  request_that_fails, bucket, storage
):
  path = paths.expand(f'{bucket}/run/{metric_files.NAME}')
  for step in range(1, 4):
    writer = lines.lines_at(path, step)
    writer.add(line(step))
    writer.close()
  storage.proxy.fail('POST|DELETE', status=403, after=request_that_fails)
  with contextlib.suppress(OSError):
    lines.lines_at(path, 9)
  storage.proxy.heal()
  assert steps(path) == [1, 2, 3]


def test_an_old_start_that_still_writes_changes_nothing(bucket):
  path = paths.expand(f'{bucket}/run/{metric_files.NAME}')
  old = lines.lines_at(path, 0)
  old.add(line(1))
  old.save()
  new = lines.lines_at(path, 1)
  old.add(line(2))
  old.save()
  new.add(line(3))
  new.save()
  assert steps(path) == [1, 3]
