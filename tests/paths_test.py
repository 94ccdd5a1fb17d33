"""What people type as a path, and what a bucket does differently."""

import os
import pathlib
import sys

import pytest

from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from tests.storage.proxy import CUT


@pytest.mark.parametrize(
  ('typed', 'expanded'),
  [
    ('runs/x', 'runs/x'),
    ('/tmp/x', '/tmp/x'),
    ('~/x', str(pathlib.Path.home() / 'x')),
    (pathlib.Path('~/x'), str(pathlib.Path.home() / 'x')),
    ('gs://bucket/x/', 'gs://bucket/x'),
    ('gs://bucket', 'gs://bucket'),
  ],
)
def test_a_path_is_local_or_in_a_bucket(typed, expanded):
  path = paths.expand(typed)
  assert str(path) == expanded
  assert paths.expand(path) == path
  assert paths.in_bucket(path) == expanded.startswith('gs')
  assert str(paths.absolute(path)).endswith(expanded)
  assert str(path / 'y') == f'{expanded}/y'


@pytest.mark.parametrize(
  ('typed', 'words'),
  [
    ('~nobody-has-this-name/x', "'~nobody-has-this-name/x': there is no such"),
    ('hdfs://host/x', "'hdfs://host/x': nothing is known of hdfs://"),
    ('gs://', "'gs://' names no bucket, as gs://bucket/x does"),
    ('gs:///x', "'gs:///x' names no bucket"),
    (pathlib.Path('gs://bucket/x'), "'gs:/bucket/x' has lost a slash"),
  ],
)
def test_a_path_that_cannot_be_is_refused_in_one_line(typed, words):
  with pytest.raises(ValueError, match=r'^[^\n]*$') as caught:
    paths.expand(typed)
  assert words in str(caught.value)


@pytest.mark.parametrize(
  ('typed', 'package', 'extra'),
  [('gs://bucket/x', 'gcsfs', 'gcs'), ('s3://bucket/x', 's3fs', 's3')],
)
def test_a_backend_that_is_not_installed_is_named(
  typed, package, extra, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"pip install 'gated_jax\[{extra}\]'"):
    paths.expand(typed)
  assert paths.expand('x').name == 'x'  # without any


def test_a_local_path_is_demanded_where_nothing_else_works():
  assert paths.local('~/x') == pathlib.Path.home() / 'x'
  with pytest.raises(ValueError, match='gs://b/x is in a bucket'):
    paths.local('gs://b/x')


def places(bucket, tmp_path):
  return [tmp_path, paths.expand(f'{bucket}/folder')]


def test_files_and_objects_answer_alike(bucket, tmp_path):
  for folder in places(bucket, tmp_path):
    one, two = folder / 'a.txt', folder / 'deep/er/b.txt'
    two.parent.mkdir(parents=True, exist_ok=True)
    paths.write_bytes(one, b'old')
    paths.write_bytes(one, b'0123456789')
    paths.write_bytes(two, b'')
    assert paths.read_bytes(one) == b'0123456789'
    assert paths.size(one) == 10
    assert paths.size(two) == 0
    assert paths.exists(one)
    assert not paths.exists(folder / 'c')
    assert paths.is_folder(folder / 'deep')
    assert not paths.is_folder(one)
    assert paths.files_below(folder) == [one, two]
    assert paths.matching(folder / '*.txt') == [one]
    assert paths.matching(f'{folder}/**/b.txt') == [two]
    with paths.open_for_reading(one) as file:
      assert file.seek(4) == 4
      assert file.read(3) == b'456'
    with pytest.raises(FileNotFoundError):
      paths.read_bytes(folder / 'c')
    paths.remove_folder(folder)
    paths.remove_folder(folder)
    assert not paths.exists(two)


def test_a_read_asks_for_a_range(bucket, storage):
  path = paths.expand(f'{bucket}/large')
  data = os.urandom(12 << 20)
  paths.write_bytes(path, data)
  del storage.proxy.requests[:]
  with paths.open_for_reading(path) as file:
    file.seek(3 << 20)
    assert file.read(1 << 20) == data[3 << 20 : 4 << 20]
  assert len([x for x in storage.proxy.requests if 'alt=media' in x]) == 1


@pytest.mark.parametrize('status', [429, 503, CUT])
def test_a_request_that_fails_for_a_moment_is_repeated(
  status, bucket, storage, at_once
):
  del at_once
  path = paths.expand(f'{bucket}/x')
  paths.write_bytes(path, b'12345678')
  storage.proxy.fail('GET .*alt=media', status=status, times=1)
  assert paths.read_bytes(path) == b'12345678'


def test_a_request_that_keeps_failing_is_said_in_one_line(
  bucket, storage, at_once
):
  del at_once
  path = paths.expand(f'{bucket}/x')
  storage.proxy.fail('GET', status=503)
  with pytest.raises(BucketError, match=f'^{path}: [^\n]*503[^\n]*$'):
    paths.read_bytes(path)


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    ('gs://absent-bucket/x', 'there is no bucket gs://absent-bucket'),
    ('gs://forbidden-bucket/x', 'no permission'),
  ],
)
def test_a_bucket_that_cannot_be_used_is_refused(path, words, storage):
  del storage
  with pytest.raises(ValueError, match=f'^{path}: {words}[^\n]*$'):
    paths.check_bucket(paths.expand(path))


def test_missing_credentials_are_said(bucket, storage):
  storage.proxy.fail('GET', status=401)
  with pytest.raises(ValueError, match=r'no credentials .* gcloud auth'):
    paths.check_bucket(paths.expand(f'{bucket}/x'))
