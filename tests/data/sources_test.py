"""Every kind of file: what is read, where it resumes, and what is skipped."""

import json
import logging
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.config import DataConfig
from gated_jax.data import array_record_source
from gated_jax.data import text_sources
from gated_jax.data import token_sources
from gated_jax.data.array_files import AS_STATED
from gated_jax.data.array_files import NONE
from gated_jax.data.array_files import Wanted
from gated_jax.data.files import find_files
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.sources import Skipped
from gated_jax.data.text_sources import make_text_source
from gated_jax.data.token_sources import TokenSource

TEXTS = [f'document {i} ' + 'é\n' * (i % 5) for i in range(50)]


def _jsonl(path, texts=TEXTS):
  path.write_text('\n'.join(json.dumps({'text': t}) for t in texts) + '\n')


def _parquet(path, texts=TEXTS):
  import pyarrow as arrow
  from pyarrow import parquet

  table = arrow.table({'id': list(range(len(texts))), 'text': texts})
  parquet.write_table(table, path, row_group_size=7)


def _array_record(path, texts=TEXTS):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for i, text in enumerate(texts):
    record = json.dumps({'text': text}) if i % 2 else text
    writer.write(record.encode())
  writer.close()


WRITERS = {
  'jsonl': _jsonl,
  'parquet': _parquet,
  'array_record': _array_record,
}


WANTED = Wanted(AS_STATED, 'bytes', 256, 'bytes')


def _source(kind, path, **changes):
  arguments = {'column': 'text', 'max_document': 1 << 20, **changes}
  return make_text_source(kind, str(path), skipped=Skipped(), **arguments)


def _all(source):
  return [
    document for unit in source.units for _, document in source.read(unit, 0)
  ]


def _first(path, source, **changes):
  small = {'batch': 1, 'length': 16, 'shuffle_tokens': 16}
  if source == 'tokens':
    small['eos'] = NONE
  config = DataConfig(source=source, paths=str(path), **(small | changes))
  pipeline = make_pipeline(config, 'train', vocab=257)
  with pipeline:
    return next(pipeline), pipeline


@pytest.fixture(params=[1 << 20, 100])
def unit_size(request, monkeypatch):
  """Whole files as units, and units far smaller than a file."""
  monkeypatch.setattr(text_sources, '_RANGE', request.param)
  monkeypatch.setattr(
    array_record_source, '_RECORDS', max(3, request.param // 20)
  )
  monkeypatch.setattr(token_sources, '_RANGE', request.param)
  return request.param


@pytest.mark.parametrize('kind', WRITERS)
def test_every_record_is_read_once_and_from_any_cursor(
  tmp_path, kind, unit_size
):
  WRITERS[kind](tmp_path / 'a')
  source = _source(kind, tmp_path / 'a')
  assert [d.text for d in _all(source)] == TEXTS
  assert unit_size > 100 or len(source.units) > 5
  for unit in source.units:
    whole = list(source.read(unit, 0))
    for i, (cursor, _) in enumerate(whole):
      rest = [d.text for _, d in source.read(unit, cursor)]
      assert rest == [d.text for _, d in whole[i + 1 :]]
  assert not len(source.skipped)


# A line, and the texts that it gives: none where it is skipped.
LINES = [
  ('{"text": "one"}\n', ['one']),
  ('\n', []),
  (' \t{"text": "led by white space"}  \r\n', ['led by white space']),
  ('{"text": "no end\n', []),
  ('{"text": "a"} {"text": "b"}\n', []),
  ('{"text": "' + 'five\\n' * 30 + '"}\n', ['five\n' * 16, 'five\n' * 14]),
  ('{"text": "\\ud800 is half of a pair"}\n', []),
  ('{"text": "\\u00e9 é", "more": NaN}\n', ['é é']),
  ('[1]\n', []),
  ('{"text": 7}\n', []),
  ('{"text": "last, without an end of its line"}', ['last, without an end of its line']),
]  # fmt: skip


@pytest.mark.parametrize('at_once', [1, 60, 1 << 18])
@pytest.mark.parametrize('size', [1, 16, 90, 1 << 20])
def test_blocks_of_lines_hold_each_document_once_from_any_cursor(
  tmp_path, monkeypatch, at_once, size
):
  monkeypatch.setattr(text_sources, '_LINES', at_once)
  monkeypatch.setattr(text_sources, '_RANGE', size)
  (tmp_path / 'a').write_text(''.join(line for line, _ in LINES))
  source = _source('jsonl', tmp_path / 'a', max_document=80)
  expected = [text for _, texts in LINES for text in texts]

  def read(unit, cursor):
    """Cursors and texts of the blocks of a unit."""
    blocks = list(source.blocks(unit, cursor))
    assert all(block.texts for block in blocks)
    return [
      pair for b in blocks for pair in zip(b.cursors, b.texts, strict=True)
    ]

  for unit in source.units:
    documents = read(unit, 0)
    for i, (cursor, _) in enumerate(documents):
      assert read(unit, cursor) == documents[i + 1 :]
    assert [text for _, text in documents] == expected[: len(documents)]
    expected = expected[len(documents) :]
  assert not expected
  # A line is skipped once, however often it is read.
  assert len(source.skipped) == sum(
    not texts and bool(line.strip()) for line, texts in LINES
  )


def test_text_files_are_documents_whole(tmp_path):
  for i, text in enumerate(TEXTS):
    (tmp_path / f'{i:02d}.txt').write_text(text)
  source = _source('text', tmp_path / '*.txt')
  assert [d.text for d in _all(source)] == TEXTS


def test_long_text_is_cut_at_line_ends_and_nowhere_in_a_character(
  tmp_path, unit_size
):
  text = ''.join(f'line {i} é漢🙂\n' for i in range(60)) + '漢' * 100
  (tmp_path / 'a.txt').write_text(text)
  source = _source('text', tmp_path / 'a.txt', max_document=50)
  pieces = [d.text for d in _all(source)]
  assert ''.join(pieces) == text
  assert max(len(p.encode()) for p in pieces) <= 50
  assert sum(p.endswith('\n') for p in pieces) > 20
  for unit in source.units:
    whole = list(source.read(unit, 0))
    for i, (cursor, _) in enumerate(whole):
      rest = list(source.read(unit, cursor))
      assert rest == whole[i + 1 :]


@pytest.mark.parametrize('kind', ['npy', 'bin'])
def test_arrays_are_cut_at_the_end_of_document_id(tmp_path, kind, unit_size):
  random = np.random.default_rng(0)
  documents = [
    np.append(random.integers(0, 50, n), 99).astype(np.uint16)
    for n in random.integers(0, 60, 80)
  ]
  joined = np.concatenate([*documents, [1, 2, 3]]).astype(np.uint16)
  path = tmp_path / f'a.{kind}'
  if kind == 'npy':
    np.save(path, joined)
  else:
    joined.tofile(path)
  about = {'dtype': 'uint16', 'eos': 99}
  (tmp_path / f'a.{kind}.json').write_text(json.dumps(about))
  source = TokenSource([str(path)], WANTED, 1000, Skipped())
  found = [d.ids.tolist() for d in _all(source)]
  assert found == [d.tolist() for d in documents] + [[1, 2, 3]]
  for unit in source.units:
    whole = list(source.read(unit, 0))
    for i, (cursor, _) in enumerate(whole):
      rest = [d.ids.tolist() for _, d in source.read(unit, cursor)]
      assert rest == [d.ids.tolist() for _, d in whole[i + 1 :]]


def test_an_array_without_ends_is_cut_by_length(tmp_path, unit_size):
  np.save(tmp_path / 'a.npy', np.arange(1000, dtype=np.int64))
  wanted = WANTED._replace(eos=NONE)
  source = TokenSource([str(tmp_path / 'a.npy')], wanted, 128, Skipped())
  found = [d.ids for d in _all(source)]
  assert max(map(len, found)) == 128
  np.testing.assert_array_equal(np.concatenate(found), np.arange(1000))


def test_globs_find_files_at_any_depth_in_a_fixed_order(tmp_path):
  for name in ('b.py', 'a/c.py', 'a/d/e.py', 'a/d/f.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('x')
  found = find_files(f'{tmp_path}/**/*.py, {tmp_path}/b.py')
  wanted = ['a/c.py', 'a/d/e.py', 'b.py']
  assert [os.path.relpath(p, tmp_path) for p in found] == wanted


def test_a_glob_that_matches_nothing_is_named(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  pattern = f'{tmp_path}/*.nothing'
  for paths in (pattern, f'{tmp_path}/a.txt,{pattern}'):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
      make_pipeline(DataConfig(source='text', paths=paths), 'train')
  with pytest.raises(ValueError, match=re.escape(f"'{tmp_path}' is a folder")):
    find_files(str(tmp_path))


def test_bad_text_files_are_skipped_counted_and_named_once(tmp_path, caplog):
  (tmp_path / 'good.txt').write_text('good ' * 50)
  (tmp_path / 'empty.txt').write_bytes(b'')
  (tmp_path / 'latin.txt').write_bytes('Grüße'.encode('latin-1'))
  (tmp_path / 'cut.txt').write_bytes('漢字'.encode()[:-1])
  with caplog.at_level(logging.WARNING):
    config = DataConfig(
      source='text',
      paths=f'{tmp_path}/*.txt',
      batch=2,
      length=16,
      validation=0,
      shuffle_tokens=64,
    )
    with make_pipeline(config, 'train') as pipeline:
      for _ in range(60):  # many epochs
        next(pipeline)
      skipped = {os.path.basename(k): v for k, v in pipeline.skipped.items()}
  assert skipped == {
    'empty.txt': 'empty',
    'latin.txt': 'not UTF-8 at byte 2',
    'cut.txt': 'not UTF-8 at byte 3',
  }
  for name in skipped:
    assert sum(name in r.getMessage() for r in caplog.records) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_file_without_permission_is_skipped(tmp_path):
  (tmp_path / 'a.txt').write_text('good')
  (tmp_path / 'b.txt').write_text('secret')
  (tmp_path / 'b.txt').chmod(0)
  _, pipeline = _first(tmp_path / '*.txt', 'text', validation=0)
  assert 'b.txt' in str(pipeline.skipped)


def test_a_truncated_line_costs_that_line_only(tmp_path):
  lines = [json.dumps({'text': t}) for t in TEXTS]
  lines[3] = '[1, 2]'
  lines[5] = '{"other": "x"}'
  lines[7] = '{"text": 5}'
  lines[8] = '{"text": "\\ud800"}'
  lines[-1] = lines[-1][:-4]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  source = _source('jsonl', tmp_path / 'a.jsonl')
  kept = [t for i, t in enumerate(TEXTS) if i not in (3, 5, 7, 8, 49)]
  assert [d.text for d in _all(source)] == kept
  reasons = list(source.skipped.report().values())
  assert len(reasons) == 5
  assert reasons[0] == 'a JSON list, not an object'
  assert reasons[1] == "no field 'text', only other"
  assert reasons[2] == "field 'text' is a int, not a string"
  assert all('a.jsonl' in where for where in source.skipped.report())


@pytest.mark.parametrize('kind', ['parquet', 'array_record'])
def test_a_truncated_file_is_skipped_beside_a_good_one(tmp_path, kind):
  WRITERS[kind](tmp_path / 'a')
  raw = (tmp_path / 'a').read_bytes()
  (tmp_path / 'b').write_bytes(raw[: len(raw) // 2])
  source = _source(kind, tmp_path / '*')
  assert [d.text for d in _all(source)] == TEXTS
  assert list(source.skipped.report()) == [str(tmp_path / 'b')]


def test_a_file_that_shrinks_while_it_is_used_is_skipped(tmp_path):
  path = tmp_path / 'a.jsonl'
  _jsonl(path)
  (tmp_path / 'b.jsonl').write_text('{"text": "good"}\n' * 20)
  config = DataConfig(
    source='jsonl',
    paths=f'{tmp_path}/*.jsonl',
    batch=1,
    length=8,
    validation=0,
    shuffle=False,
    prefetch=1,
  )
  with make_pipeline(config, 'train') as pipeline:
    path.write_text('{"text": "short"}\n')
    for _ in range(90):
      next(pipeline)
    assert 'truncated' in pipeline.skipped[str(path)]


def test_nothing_left_to_read_is_an_error_that_says_why(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xff')
  (tmp_path / 'b.txt').write_bytes(b'')
  with pytest.raises(ValueError, match=r'2 skipped .*not UTF-8 at byte 0'):
    _first(tmp_path / '*.txt', 'text', validation=0)
  with pytest.raises(ValueError, match=r'no usable data file .*empty'):
    _first(tmp_path / 'b.txt', 'text')


def test_a_missing_column_names_those_that_are_there(tmp_path):
  _parquet(tmp_path / 'a')
  with pytest.raises(ValueError, match="no column 'body', only id, text"):
    _first(tmp_path / 'a', 'parquet', column='body')
  with pytest.raises(ValueError, match="column 'id' is int64, not string"):
    _first(tmp_path / 'a', 'parquet', column='id')


@pytest.mark.parametrize('bad', [257, -1, 2**31])
def test_an_id_beyond_the_vocabulary_names_itself_and_the_file(tmp_path, bad):
  ids = np.zeros(200, np.int64)
  ids[150] = bad
  np.save(tmp_path / 'ids.npy', ids)
  with pytest.raises(ValueError, match=rf'token id {bad} in .*ids.npy'):
    _first(tmp_path / 'ids.npy', 'tokens', validation=0)


@pytest.mark.parametrize(
  ('array', 'reason'),
  [
    (np.zeros((3, 3), np.int32), 'not one axis of integers'),
    (np.zeros(3, np.float32), 'not one axis of integers'),
    (np.array(['a'], object), 'Python objects'),
    (np.zeros(0, np.int32), 'empty'),
  ],
)
def test_an_array_of_something_else_is_skipped(tmp_path, array, reason):
  np.save(tmp_path / 'a.npy', array)
  with pytest.raises(ValueError, match=f'1 skipped .*{reason}'):
    _first(tmp_path / 'a.npy', 'tokens')


def test_a_raw_array_must_say_its_dtype_and_be_whole(tmp_path):
  (tmp_path / 'a.bin').write_bytes(b'\1\0' * 50 + b'\1')
  with pytest.raises(ValueError, match=r'needs .*a.bin.json with its dtype'):
    _first(tmp_path / 'a.bin', 'tokens')
  (tmp_path / 'a.bin.json').write_text('{"dtype": "uint16"}')
  with pytest.raises(ValueError, match='truncated'):
    _first(tmp_path / 'a.bin', 'tokens')


QUIET = settings(
  max_examples=40,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _survives(path, kind):
  """Either batches or one clear line, whatever the file holds."""
  try:
    batch, _ = _first(path, kind, validation=0)
  except ValueError as error:
    assert '\n' not in str(error)
    assert path.name in str(error)
    return
  assert batch['tokens'].shape == (1, 16)
  assert batch['weights'].all()


@QUIET
@given(data=st.binary(max_size=300))
@pytest.mark.parametrize(
  'kind', ['text', 'jsonl', 'parquet', 'array_record', 'tokens']
)
def test_any_bytes_are_read_or_refused(tmp_path, kind, data):
  suffix = '.npy' if kind == 'tokens' else ''
  path = tmp_path / f'fuzz{suffix}'
  path.write_bytes(data)
  _survives(path, kind)


@QUIET
@given(
  hits=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    max_size=5,
  ),
  keep=st.floats(0, 1),
)
@pytest.mark.parametrize('kind', ['jsonl', 'parquet', 'array_record', 'tokens'])
def test_a_damaged_file_is_read_or_refused(tmp_path, kind, hits, keep):
  good, path = tmp_path / 'good.npy', tmp_path / 'fuzz.npy'
  if not good.exists():
    if kind == 'tokens':
      np.save(good, np.tile(np.array([1, 2, 256], np.int32), 40))
    else:
      WRITERS[kind](good)
  raw = bytearray(good.read_bytes())
  for place, value in hits:
    raw[int(place * len(raw))] = value
  path.write_bytes(raw[: int(keep * len(raw))])
  _survives(path, kind)


@QUIET
@given(
  records=st.lists(
    st.recursive(
      st.none() | st.booleans() | st.floats() | st.text(max_size=8),
      lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(['text', 'a']), inner, max_size=2)
      ),
      max_leaves=4,
    ),
    max_size=5,
  )
)
def test_any_json_is_read_or_refused(tmp_path, records):
  path = tmp_path / 'fuzz.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  _survives(path, 'jsonl')
