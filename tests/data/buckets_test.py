"""Data in a bucket: the batches of the same files on a disk, and no others."""

import io
import json
import pathlib
import time

import fsspec
import numpy as np
import pytest

from gated_jax import paths
from gated_jax.config import DataConfig
from gated_jax.data import buckets
from gated_jax.data import ranges
from gated_jax.data.array_record_source import ArrayRecords
from gated_jax.data.copies import GRAIN
from gated_jax.data.copies import Copies
from gated_jax.data.files import DataFiles
from gated_jax.data.files import find_files
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.ranges import RangeFile
from gated_jax.data.tokenize import Work
from gated_jax.data.tokenize import tokenize
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.data.watch import FilesChangedError
from gated_jax.data.watch import FilesOutOfReachError
from tests.storage.proxy import CUT
from tests.storage.proxy import SILENT
from tests.storage.proxy import STALL

TEXTS = [f'<{i:03d}> ' + 'some words of a text ' * (i % 40) for i in range(300)]
PER_FILE = 100
EOS = 256


def write_text(path, texts):
  path.write_text('\n'.join(texts))


def write_jsonl(path, texts):
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))


def write_conversations(path, texts):
  path.write_text(
    '\n'.join(json.dumps({'prompt': 'And?', 'completion': x}) for x in texts)
  )


def write_parquet(path, texts):
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = list(range(len(texts)))
  table = arrow.table({'before': rows, 'text': texts, 'after': rows})
  parquet.write_table(table, path, row_group_size=30)


def write_records(path, texts):
  module = pytest.importorskip('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(path), 'group_size:7')
  for text in texts:
    writer.write(text.encode())
  writer.close()


def write_array(path, texts):
  ids = b''.join(text.encode() for text in texts)
  array = np.frombuffer(ids, np.uint8).astype(np.uint16)
  array[array == ord('>')] = EOS
  np.save(path, array)


def write_raw(path, texts):
  write_array(path.with_suffix('.npy'), texts)
  array = np.load(path.with_suffix('.npy'))
  path.with_suffix('.npy').unlink()
  array.tofile(path)
  about = {'dtype': 'uint16', 'eos': EOS}
  pathlib.Path(f'{path}.json').write_text(json.dumps(about))


KINDS = {
  'text': ('text', 'txt', write_text),
  'jsonl': ('jsonl', 'jsonl', write_jsonl),
  'conversations': ('conversations', 'jsonl', write_conversations),
  'parquet': ('parquet', 'parquet', write_parquet),
  'array_record': ('array_record', 'array_record', write_records),
  'npy': ('tokens', 'npy', write_array),
  'raw': ('tokens', 'bin', write_raw),
}


@pytest.fixture
def small_units(monkeypatch):
  """Several units in each file, and several pieces in each unit."""
  monkeypatch.setattr('gated_jax.data.text_sources._RANGE', 9_000)
  monkeypatch.setattr('gated_jax.data.text_sources._LINE', 100)
  monkeypatch.setattr('gated_jax.data.token_sources._RANGE', 9_000)
  monkeypatch.setattr('gated_jax.data.array_record_source._RECORDS', 40)
  monkeypatch.setattr(ranges, 'PIECE', 4_000)


def put(folder, kind, bucket):
  """The same files in a folder and a bucket; globs of both."""
  _, suffix, write = KINDS[kind]
  folder.mkdir(exist_ok=True)
  for number in range(len(TEXTS) // PER_FILE):
    texts = TEXTS[PER_FILE * number : PER_FILE * (number + 1)]
    write(folder / f'{number}.{suffix}', texts)
  for path in folder.iterdir():
    place = paths.expand(f'{bucket}/d/{path.name}')
    paths.write_bytes(place, path.read_bytes())
  return f'{folder}/*.{suffix}', f'{bucket}/d/*.{suffix}'


def config_of(where, kind, **changes):
  source = KINDS[kind][0]
  settings = {'batch': 2, 'length': 64, 'shuffle_tokens': 512, **changes}
  if kind == 'npy':
    settings['eos'] = EOS
  return DataConfig(source=source, paths=where, **settings)


def batches_of(config, count, state=None):
  with make_pipeline(config, 'train') as pipeline:
    if state:
      pipeline.restore(state)
    batches = [next(pipeline) for _ in range(count)]
    return batches, pipeline.state()


def assert_same(batches, wanted):
  for batch, other in zip(batches, wanted, strict=True):
    for name in other:
      np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize('kind', KINDS)
def test_batches_are_those_of_the_files_on_a_disk(
  tmp_path, kind, bucket, small_units
):
  here, there = put(tmp_path / 'd', kind, bucket)
  wanted, state = batches_of(config_of(here, kind), 60)
  assert_same(batches_of(config_of(there, kind), 60)[0], wanted)
  # A run that began on the disk goes on from the bucket, which has the same.
  more, _ = batches_of(config_of(here, kind), 5, state)
  assert_same(batches_of(config_of(there, kind), 5, state)[0], more)
  _, state = batches_of(config_of(there, kind), 60)
  assert_same(batches_of(config_of(there, kind), 5, state)[0], more)


def test_requests_are_made_ahead_and_beside_each_other(
  tmp_path, bucket, storage, small_units, monkeypatch
):
  _, there = put(tmp_path / 'd', 'jsonl', bucket)
  storage.proxy.delay = 0.03
  open_stretch, fetch = DataFiles.open, buckets.fetch
  expected, spans = [], []

  def noting_open(self, path, begin=0, end=0):
    expected.append((path, begin, end) in self._expected)
    return open_stretch(self, path, begin, end)

  def noting_fetch(*args):
    start = time.perf_counter()
    data = fetch(*args)
    spans.append((start, time.perf_counter()))
    return data

  monkeypatch.setattr(DataFiles, 'open', noting_open)
  monkeypatch.setattr(buckets, 'fetch', noting_fetch)
  with make_pipeline(config_of(there, 'jsonl'), 'train') as pipeline:
    for _ in range(400):
      next(pipeline)
  # Every stretch but the first was asked for before it was opened.
  assert expected[0] is False
  assert all(expected[1:]) and len(expected) > 6
  # The time under way of all requests, over the time when any was.
  waited, end = 0.0, 0.0
  for start, stop in sorted(spans):
    waited += max(stop, end) - max(start, end)
    end = max(stop, end)
  assert sum(stop - start for start, stop in spans) > 1.5 * waited


@pytest.mark.parametrize('kind', ['jsonl', 'raw', 'parquet'])
@pytest.mark.parametrize('change', ['written', 'removed'])
def test_a_file_that_changes_ends_the_run_with_its_name(
  tmp_path, kind, change, bucket, small_units
):
  _, there = put(tmp_path / 'd', kind, bucket)
  files = fsspec.filesystem('gs')
  with make_pipeline(config_of(there, kind), 'train') as pipeline:
    next(pipeline)
    for path in files.ls(f'{bucket}/d', detail=False):
      if change == 'removed':
        files.rm(path)
      else:
        files.pipe_file(path, files.cat_file(path))
    with pytest.raises(FilesChangedError, match='has changed since') as error:
      for _ in range(1000):
        next(pipeline)
  assert f'{bucket}/d/' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('status', [429, 503, CUT, STALL, SILENT])
def test_requests_that_fail_for_a_moment_change_nothing(
  tmp_path, status, bucket, storage, small_units, at_once, impatient
):
  here, there = put(tmp_path / 'd', 'jsonl', bucket)
  wanted, _ = batches_of(config_of(here, 'jsonl'), 60)
  with make_pipeline(config_of(there, 'jsonl'), 'train') as pipeline:
    storage.proxy.fail('GET /download', status=status, times=4)
    assert_same([next(pipeline) for _ in range(60)], wanted)
  assert storage.proxy.struck()


@pytest.mark.parametrize(
  ('status', 'reason'), [(503, '503'), (STALL, 'no answer in time')]
)
def test_a_bucket_that_stays_away_ends_the_run_in_one_line(
  tmp_path, status, reason, bucket, storage, small_units, at_once, impatient
):
  _, there = put(tmp_path / 'd', 'jsonl', bucket)
  with make_pipeline(config_of(there, 'jsonl'), 'train') as pipeline:
    next(pipeline)
    state = pipeline.state()
    storage.proxy.fail('GET /download', status=status)
    with pytest.raises(
      FilesOutOfReachError, match=rf'\.jsonl: .*{reason}'
    ) as error:
      for _ in range(1000):
        next(pipeline)
    assert '\n' not in str(error.value)
    storage.proxy.heal()
  with make_pipeline(config_of(there, 'jsonl'), 'train') as pipeline:
    pipeline.restore(state)
    next(pipeline)


@pytest.mark.parametrize(
  ('where', 'message'),
  [
    ('gs://no-such-bucket/d/*', 'there is no bucket gs://no-such-bucket'),
    ('gs://forbidden/d/*', 'gs://forbidden/d.*no permission'),
    ('ftp://host/d', 'nothing is known of ftp://'),
    ('gs://', 'names no bucket'),
    ('{bucket}/d', "is a folder: say which of its files, as in '.*/d/.'"),
    ('{bucket}/d/*.txt', r"no data files match '.*/d/\*.txt'"),
  ],
)
def test_what_is_not_there_is_said_in_one_line(
  tmp_path, bucket, where, message
):
  put(tmp_path / 'd', 'jsonl', bucket)
  config = config_of(where.format(bucket=bucket), 'jsonl')
  with pytest.raises(ValueError, match=message) as error:
    make_pipeline(config, 'train')
  assert '\n' not in str(error.value)


def test_text_in_a_bucket_becomes_arrays_there(tmp_path, bucket):
  pytest.importorskip('tokenizers')
  here, there = put(tmp_path / 'd', 'jsonl', bucket)
  made = {'source': 'jsonl', 'train_tokenizer': 300}
  counts = tokenize(Work(paths=here, out=str(tmp_path / 'ids'), **made))
  assert tokenize(Work(paths=there, out=f'{bucket}/ids', **made)) == counts
  names = sorted(path.name for path in (tmp_path / 'ids').iterdir())
  files = fsspec.filesystem('gs')
  for name in names:
    content = files.cat_file(f'{bucket}/ids/{name}')
    assert content == (tmp_path / 'ids' / name).read_bytes()
  assert len(files.ls(f'{bucket}/ids')) == len(names)
  tokenizer = make_tokenizer(f'{bucket}/ids')
  assert tokenizer.decode(tokenizer.encode('some words')) == 'some words'
  config = DataConfig(
    source='tokens',
    paths=f'{bucket}/ids/*.bin',
    tokenizer=f'{bucket}/ids',
    batch=2,
    length=32,
  )
  with make_pipeline(config, 'train') as pipeline:
    next(pipeline)


def test_arrays_are_not_written_below_an_object(bucket):
  paths.write_bytes(paths.expand(f'{bucket}/object'), b'x')
  work = Work(source='stdlib', paths='', out=f'{bucket}/object')
  with pytest.raises(ValueError, match='/object is an object: choose another'):
    tokenize(work)


class Unpinned:
  """A file system that cannot be asked for a version, with s3fs's arguments."""

  def __init__(self, content):
    self.content = content

  def info(self, path):
    return {'size': len(self.content), 'ETag': str(hash(self.content))}

  def cat_file(self, path, version_id=None, start=None, end=None):
    if start >= len(self.content):
      raise OSError(22, 'the requested range is not satisfiable')
    return self.content[start:end]


@pytest.mark.parametrize('content', [b'', b'short', b'x' * 100, b'y' * 500])
def test_a_change_is_noticed_where_no_version_can_be_asked_for(
  monkeypatch, content
):
  files = Unpinned(bytes(range(200)))
  monkeypatch.setattr(buckets, 'expand', lambda path: path)
  monkeypatch.setattr(buckets, 'file_system', lambda path: files)
  known = buckets.entry('s3://bucket/a')
  assert buckets.fetch('s3://bucket/a', known, 20, 90) == files.content[20:90]
  files.content = content
  with pytest.raises(FilesChangedError, match='s3://bucket/a has changed'):
    buckets.fetch('s3://bucket/a', known, 20, 90)


def test_globs_are_those_of_a_disk(tmp_path, bucket):
  names = (
    'a.txt',
    'b/c.txt',
    'b/d/e.txt',
    '.hidden.txt',
    'b/.no/f.txt',
    'g.py',
  )
  files = fsspec.filesystem('gs')
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('x')
    files.pipe_file(f'{bucket}/{name}', b'x')
  for pattern in ('*.txt', '**/*.txt', 'b/*/e.txt', '[ab].txt', 'b/c.txt'):
    here = find_files(f'{tmp_path}/{pattern}')
    there = find_files(f'{bucket}/{pattern}')
    assert [x.removeprefix(f'{bucket}/') for x in there] == [
      str(pathlib.Path(x).relative_to(tmp_path)) for x in here
    ]


def test_a_stretch_is_fetched_once_and_no_more_than_asked(monkeypatch):
  monkeypatch.setattr(ranges, 'PIECE', 1000)
  content = bytes(i % 251 for i in range(100_000))
  asked = []

  def fetch(begin, end):
    asked.append((begin, end))
    return content[begin:end]

  files = DataFiles()
  raw = RangeFile(fetch, len(content), 20_000, 32_500, files._pool)
  with io.BufferedReader(raw, 256) as file:
    file.seek(20_000)
    assert file.read(12_500) == content[20_000:32_500]
    assert sorted(asked) == [
      (a, min(a + 1000, 32_500)) for a in range(20_000, 32_500, 1000)
    ]
    assert file.read(10) == content[32_500:32_510]
    file.seek(-7, io.SEEK_END)
    assert file.read() == content[-7:]
    assert file.read() == b''


def test_record_files_are_read_through_holes(tmp_path):
  write_records(
    tmp_path / 'a',
    [f'{i} {np.random.default_rng(i).bytes(3000)!r}' for i in range(900)],
  )
  content = (tmp_path / 'a').read_bytes()
  fetched = []

  def fetch(begin, end):
    fetched.append(end - begin)
    return content[begin:end]

  whole = ArrayRecords(str(tmp_path / 'a'), None)
  copies = Copies(room=3 * GRAIN)
  copy = copies.open('a', len(content), fetch)
  with whole, ArrayRecords('a', copy) as file:
    assert file.total == 900
    for begin in (0, 700, 350, 836):
      assert file.read(begin, begin + 64) == whole.read(begin, begin + 64)
  assert sum(fetched) < len(content)
  assert copy.path.stat().st_size == len(content)
  # Another copy takes the room of this one, which is filled again at need.
  copies.open('b', len(content), fetch)
  assert not copy.filled
  with ArrayRecords('a', copy) as file:
    assert file.read(5, 6) == ArrayRecords(str(tmp_path / 'a'), None).read(5, 6)

    def gone(begin, end):
      raise FilesChangedError(f'{begin} to {end}')

    copy._fetch = gone
    copy.empty()
    with pytest.raises(FilesChangedError):
      file.read(600, 601)


def test_damaged_record_files_in_a_bucket_are_skipped(tmp_path, bucket):
  put(tmp_path / 'd', 'array_record', bucket)
  files = fsspec.filesystem('gs')
  content = bytearray(files.cat_file(f'{bucket}/d/1.array_record'))
  content[100] ^= 1
  files.pipe_file(f'{bucket}/d/1.array_record', bytes(content))
  files.pipe_file(f'{bucket}/d/2.array_record', b'no such file' * 10_000)
  config = config_of(f'{bucket}/d/*', 'array_record', validation=0)
  with make_pipeline(config, 'train') as pipeline:
    for _ in range(300):
      next(pipeline)
    names = {name.rpartition('/')[2] for name in pipeline.skipped}
  assert names == {'1.array_record', '2.array_record'}
