"""The whole way from files to batches: nothing lost, doubled, leaked or moved."""

import collections
import itertools
import json
import re
import shutil
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.config import DataConfig
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.tokenizer import ByteTokenizer

SMALL = {'batch': 4, 'length': 32, 'shuffle_tokens': 256, 'prefetch': 2}
MARK = re.compile(r'<(\d+)>')


def _write_corpus(folder, documents=120, per_file=1):
  """Text files whose documents say their number in every line."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(documents):
    text = f'<{i:03d}> words\n' * (3 + i % 7)
    (folder / f'{i:03d}.txt').write_text(text)
  return str(folder / '*.txt')


def _write_lines(path, documents=120):
  records = [
    json.dumps({'text': f'<{i:03d}> words\n' * (3 + i % 7)})
    for i in range(documents)
  ]
  path.write_text('\n'.join(records))
  return str(path)


def _config(paths='', source='text', **changes):
  return DataConfig(**{**SMALL, 'source': source, 'paths': paths, **changes})


def _take(pipeline, count):
  with pipeline:
    return list(itertools.islice(pipeline, count))


def _texts(batches):
  """Text per segment, with ids above the bytes left out."""
  texts = []
  for batch in batches:
    joined = np.ones_like(batch['tokens'])
    numbers = batch.get('segments', joined)
    for row, segments in zip(batch['tokens'], numbers, strict=True):
      for number in range(1, segments.max() + 1):
        ids = row[segments == number]
        texts.append(bytes(i for i in ids.tolist() if i < 256).decode())
  return texts


def _numbers(batches):
  return {int(n) for text in _texts(batches) for n in MARK.findall(text)}


def _pairs(batches):
  found = collections.Counter()
  for batch in batches:
    weights = batch['weights'] > 0
    found.update(
      zip(
        batch['tokens'][weights].tolist(),
        batch['targets'][weights].tolist(),
        strict=True,
      )
    )
  return found


def _equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_is_as_the_step_expects_it():
  with make_pipeline(DataConfig(), 'train', vocab=257) as pipeline:
    batch = next(pipeline)
  assert {key: value.dtype.name for key, value in batch.items()} == {
    'tokens': 'int32',
    'targets': 'int32',
    'segments': 'int32',
    'positions': 'int32',
    'weights': 'float32',
  }
  assert {value.shape for value in batch.values()} == {(8, 256)}
  assert batch['weights'].all()
  assert 0 <= batch['tokens'].min() <= batch['tokens'].max() < 257


def test_the_default_reads_this_interpreters_own_library():
  train = make_pipeline(DataConfig(), 'train')
  validation = make_pipeline(DataConfig(), 'validation')
  text = ''.join(_texts_of_bytes(_take(train, 20)))
  assert text.count('self') + text.count('def ') > 20
  # A twentieth of several megabytes.
  assert len(_take(validation, 10_000)) * 8 * 256 > 100_000
  assert not train.skipped


def _texts_of_bytes(batches):
  for batch in batches:
    for row in batch['tokens']:
      yield bytes(i for i in row.tolist() if i < 256).decode(errors='replace')


@pytest.mark.parametrize(
  ('writer', 'rows'),
  [('files', 'cut'), ('lines', 'cut'), ('lines', 'joined'), ('lines', 'whole')],
)
def test_training_and_validation_share_no_document_and_miss_none(
  tmp_path, writer, rows
):
  changes = {'validation': 0.3, 'rows': rows}
  if rows == 'whole':  # documents of more than a row alone are refused
    changes['length'] = 128
  if writer == 'files':
    config = _config(_write_corpus(tmp_path), **changes)
  else:
    paths = _write_lines(tmp_path / 'a.jsonl')
    config = _config(paths, 'jsonl', **changes)
  held = _numbers(_take(make_pipeline(config, 'validation'), 10_000))
  count = 6400 // config.length
  seen = _numbers(_take(make_pipeline(config, 'train'), count))
  assert not held & seen
  assert held | seen == set(range(120))
  assert 15 < len(held) < 60


def test_copies_of_a_document_fall_on_one_side_in_any_format(tmp_path):
  files = _write_corpus(tmp_path / 'text')
  lines = _write_lines(tmp_path / 'a.jsonl')
  one = _config(files, validation=0.3)
  other = _config(lines, 'jsonl', validation=0.3, seed=7)
  sides = [
    _numbers(_take(make_pipeline(config, 'validation'), 10_000))
    for config in (one, other)
  ]
  assert sides[0] == sides[1]


def test_validation_holds_each_held_out_pair_once(tmp_path):
  config = _config(_write_corpus(tmp_path), validation=0.5)
  batches = _take(make_pipeline(config, 'validation'), 10_000)
  held = _numbers(batches)
  wanted = collections.Counter()
  for i in held:
    ids = [256, *(f'<{i:03d}> words\n' * (3 + i % 7)).encode(), 256]
    wanted.update(itertools.pairwise(ids))
  assert _pairs(batches) == wanted
  assert all(b['tokens'].shape == (4, 32) for b in batches)


def test_validation_is_the_same_each_time_and_for_any_number_of_processes(
  tmp_path,
):
  config = _config(_write_corpus(tmp_path), validation=0.5)
  whole = _take(make_pipeline(config, 'validation'), 10_000)
  parts = [
    _take(make_pipeline(config, 'validation', shard=i, shards=2), 10_000)
    for i in range(2)
  ]
  assert len(whole) == len(parts[0]) == len(parts[1]) > 2
  for batch, *own in zip(whole, *parts, strict=True):
    joined = {k: np.concatenate([p[k] for p in own]) for k in batch}
    _equal(batch, joined)


@pytest.mark.parametrize('writer', ['files', 'one file'])
def test_processes_share_no_document_and_miss_none(tmp_path, writer):
  if writer == 'files':
    paths, source = _write_corpus(tmp_path), 'text'
  else:
    paths, source = _write_lines(tmp_path / 'a.jsonl'), 'jsonl'
  config = _config(paths, source, validation=0, shuffle=False)
  parts = [
    _numbers(_take(make_pipeline(config, 'train', shard=i, shards=4), 300))
    for i in range(4)
  ]
  assert sum(map(len, parts)) == 120
  assert set().union(*parts) == set(range(120))


def test_each_epoch_is_shuffled_anew_and_holds_each_document_once(tmp_path):
  paths = _write_corpus(tmp_path, documents=40)
  config = _config(paths, validation=0, shuffle_tokens=1, batch=2)
  orders = []
  for shard in range(2):
    batches = _take(make_pipeline(config, 'train', shard=shard, shards=2), 600)
    # A document begins with 256 as an input at position 0.
    found = []
    for text, begins in _starts(batches):
      if begins and text:
        found.append(int(text))
    orders.append([found[i : i + 20] for i in range(0, 60, 20)])
  for epoch in range(3):
    both = orders[0][epoch] + orders[1][epoch]
    assert sorted(both) == list(range(40))
  assert orders[0][0] != orders[0][1] != orders[0][2]


def _starts(batches):
  """Per document that begins: its number, from the stream of all tokens."""
  ids = np.concatenate([b['tokens'].reshape(-1) for b in batches])
  for place in np.flatnonzero(ids == 256):
    head = bytes(i for i in ids[place + 1 : place + 6].tolist() if i < 256)
    match = MARK.fullmatch(head.decode())
    yield (match.group(1) if match else ''), True


def test_the_order_follows_from_the_seed_alone(tmp_path):
  paths = _write_corpus(tmp_path)
  first, again, other = (
    _take(make_pipeline(_config(paths, seed=seed), 'train'), 8)
    for seed in (1, 1, 2)
  )
  for a, b in zip(first, again, strict=True):
    _equal(a, b)
  assert any(
    (a['tokens'] != b['tokens']).any()
    for a, b in zip(first, other, strict=True)
  )


def _sources(tmp_path):
  files = _write_corpus(tmp_path / 'text', documents=30)
  lines = _write_lines(tmp_path / 'a.jsonl', documents=30)
  tokens = np.tile(np.array([*range(40), 256], np.uint16), 30)
  np.save(tmp_path / 'a.npy', tokens)
  return {
    'stdlib': DataConfig(**SMALL),
    'text': _config(files),
    'jsonl': _config(lines, 'jsonl'),
    'tokens': _config(str(tmp_path / 'a.npy'), 'tokens', eos=256, validation=0),
    'synthetic': _config(source='synthetic'),
    'mixture': _config(
      source='mixture',
      mixture=(f'1:text:{files}', f'2:jsonl:{lines}', '0.5:synthetic'),
    ),
    'unshuffled': _config(files, shuffle=False),
    'joined': _config(files, rows='joined', first_token=256),
    'whole': _config(files, rows='whole', length=256),
    'joined tokens': _config(
      str(tmp_path / 'a.npy'), 'tokens', eos=256, validation=0, rows='joined'
    ),
  }


@pytest.mark.parametrize(
  'source',
  [
    pytest.param('stdlib', marks=pytest.mark.long),
    'text',
    'jsonl',
    'tokens',
    'synthetic',
    'mixture',
    'unshuffled',
    'joined',
    'joined tokens',
    'whole',
  ],
)
def test_a_restored_pipeline_goes_on_with_the_same_batches(tmp_path, source):
  config = _sources(tmp_path)[source]
  with make_pipeline(config, 'train') as pipeline:
    states, batches = [pipeline.state()], []
    for _ in range(24):
      batches.append(next(pipeline))
      states.append(pipeline.state())
  for i in (0, 1, 7, 8, 13, 20):
    with make_pipeline(config, 'train') as again:
      again.restore(states[i])
      assert again.batches == i
      assert again.state() == states[i]
      for batch in batches[i : i + 4]:
        _equal(next(again), batch)


def test_one_pipeline_can_go_back_and_forth(tmp_path):
  with make_pipeline(_config(_write_corpus(tmp_path)), 'train') as pipeline:
    next(pipeline)
    state = pipeline.state()
    wanted = [next(pipeline) for _ in range(3)]
    time.sleep(0.05)  # the threads have read ahead
    pipeline.restore(state)
    for batch in wanted:
      _equal(next(pipeline), batch)


def test_validation_resumes_as_well(tmp_path):
  config = _config(_write_corpus(tmp_path), validation=0.5)
  with make_pipeline(config, 'validation') as pipeline:
    next(pipeline)
    state, rest = pipeline.state(), list(pipeline)
  with make_pipeline(config, 'validation') as again:
    again.restore(state)
    for a, b in zip(again, rest, strict=True):
      _equal(a, b)


def test_joined_rows_of_an_array_are_the_array(tmp_path):
  ids = np.arange(1000, dtype=np.uint16) % 250
  ids[99::100] = 256
  np.save(tmp_path / 'a.npy', ids)
  config = _config(
    str(tmp_path / 'a.npy'),
    'tokens',
    rows='joined',
    eos=256,
    shuffle=False,
    validation=0,
  )
  (batch,) = _take(make_pipeline(config, 'train'), 1)
  kinds = {name: value.dtype.name for name, value in batch.items()}
  assert kinds == {'tokens': 'int32', 'targets': 'int32', 'weights': 'float32'}
  np.testing.assert_array_equal(batch['tokens'].reshape(-1), ids[:128])
  np.testing.assert_array_equal(batch['targets'].reshape(-1), ids[1:129])


def test_joined_text_has_one_end_between_documents_and_none_is_shared(tmp_path):
  paths = _write_corpus(tmp_path)
  config = _config(paths, rows='joined', first_token=256, validation=0.3)
  held = _take(make_pipeline(config, 'validation'), 10_000)
  seen = _take(make_pipeline(config, 'train'), 200)
  for batch in held + seen:
    assert (batch['tokens'][:, 0] == 256).all()
    both_ends = (batch['tokens'] == 256) & (batch['targets'] == 256)
    # A row may begin with the first token where a document has just ended.
    assert not both_ends[:, 1:].any()
  held, seen = (
    {int(n) for b in batches for n in MARK.findall(_as_text(b))}
    for batches in (held, seen)
  )
  assert not held & seen
  assert held | seen == set(range(120))


def _as_text(batch):
  ids = batch['tokens'][batch['weights'] > 0]
  return bytes(np.where(ids < 256, ids, 10).astype(np.uint8)).decode()


def test_padding_of_joined_rows_repeats_text_without_weight(tmp_path):
  config = _config(_write_corpus(tmp_path), rows='joined', validation=0.3)
  batches = _take(make_pipeline(config, 'validation'), 10_000)
  last = batches[-1]
  used = last['weights'].any(axis=1)
  assert 0 < used.sum() < 4  # the corpus is chosen so
  for row in np.flatnonzero(~used):
    np.testing.assert_array_equal(
      last['tokens'][row], last['tokens'][row % used.sum()]
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rows': 'glued'}, "data.rows='glued' must be one of cut, joined, whole"),
    ({'rows': 'joined', 'first_token': -2}, 'must be an id, or -1 for none'),
    ({'first_token': 5}, "does nothing with data.rows='cut'"),
    ({'rows': 'joined', 'first_token': 300}, 'outside the vocabulary of 257'),
  ],
)
def test_rows_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make_pipeline(_config(source='stdlib', **changes), 'train')


def test_a_position_without_a_younger_setting_stands_at_its_default(tmp_path):
  config = _config(_write_corpus(tmp_path, documents=10))
  state = json.loads(make_pipeline(config, 'train').state())
  del state['about']['data.rows'], state['about']['data.first_token']
  old = json.dumps(state).encode()
  make_pipeline(config, 'train').restore(old)
  joined = _config(config.paths, rows='joined')
  with pytest.raises(ValueError, match=r"data.rows='cut', not 'joined'"):
    make_pipeline(joined, 'train').restore(old)


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'seed': 1}, 'data.seed=0, not 1'),
    ({'batch': 8}, 'data.batch=4, not 8'),
    ({'length': 64}, 'data.length=32, not 64'),
    ({'shuffle': False}, 'data.shuffle=True, not False'),
    ({'validation': 0.1}, 'data.validation=0.05, not 0.1'),
  ],
)
def test_a_position_of_other_settings_is_refused(tmp_path, change, named):
  paths = _write_corpus(tmp_path, documents=10)
  state = make_pipeline(_config(paths), 'train').state()
  other = make_pipeline(_config(paths, **change), 'train')
  with pytest.raises(ValueError, match=re.escape(named)):
    other.restore(state)


def test_a_position_of_other_files_or_processes_is_refused(tmp_path):
  config = _config(_write_corpus(tmp_path, documents=10))
  state = make_pipeline(config, 'train').state()
  with pytest.raises(ValueError, match='processes=1, not 2'):
    make_pipeline(config, 'train', shards=2).restore(state)
  with pytest.raises(ValueError, match="split='train', not 'validation'"):
    make_pipeline(config, 'validation').restore(state)
  make_pipeline(_config(config.paths, prefetch=9), 'train').restore(state)
  moved = shutil.copytree(tmp_path, tmp_path / 'elsewhere')
  make_pipeline(_config(f'{moved}/*.txt'), 'train').restore(state)
  (tmp_path / '003.txt').write_text('changed')
  with pytest.raises(ValueError, match=r'names or sizes differ'):
    make_pipeline(config, 'train').restore(state)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=40))
def test_bytes_that_are_no_position_are_refused(state):
  with (
    make_pipeline(_config(source='synthetic'), 'train') as pipeline,
    pytest.raises(ValueError, match='not a data position'),
  ):
    pipeline.restore(state)


def test_a_mixture_is_weighted_by_tokens(tmp_path):
  (tmp_path / 'a.txt').write_text('a' * 900)
  (tmp_path / 'b.txt').write_text('b' * 90)
  config = _config(
    source='mixture',
    validation=0,
    mixture=(f'3:text:{tmp_path}/a.txt', f'1:text:{tmp_path}/b.txt'),
  )
  ids = np.stack(
    [b['tokens'] for b in _take(make_pipeline(config, 'train'), 64)]
  )
  share = (ids == ord('a')).sum() / (
    (ids == ord('a')) | (ids == ord('b'))
  ).sum()
  assert abs(share - 0.75) < 0.02


def test_held_out_batches_say_which_source_they_are_from(tmp_path):
  (tmp_path / 'a.txt').write_text('a' * 900)
  (tmp_path / 'b.txt').write_text('b' * 90)
  a, b = (f'1:text:{tmp_path}/{name}.txt' for name in 'ab')
  config = _config(source='mixture', validation=0.999999, mixture=(a, b, b))
  assert config.names() == (a[2:], f'1:{b[2:]}', f'2:{b[2:]}')
  with make_pipeline(config, 'validation') as pipeline:
    seen = [(pipeline.source, batch['tokens'][0, 0]) for batch in pipeline]
  assert {name for name, _ in seen} == set(config.names())
  assert all(chr(first) == name[-5] for name, first in seen)


def test_synthetic_documents_repeat_after_their_span():
  config = _config(source='synthetic', length=128, validation=0)
  batches = _take(make_pipeline(config, 'train', vocab=1000), 4)
  assert max(b['tokens'].max() for b in batches) < 1000
  repeats = 0
  for batch in batches:
    for row, segments in zip(batch['tokens'], batch['segments'], strict=True):
      ids = row[segments == 1]
      repeats += any(
        (ids[p:] == ids[:-p]).all() for p in range(8, 33) if len(ids) > p + 8
      )
  assert repeats >= 8


def test_a_caller_slower_than_the_data_does_not_wait(tmp_path, monkeypatch):
  real = ByteTokenizer.encode_batch

  def slow(*args, **kwargs):
    time.sleep(0.02)
    return real(*args, **kwargs)

  monkeypatch.setattr(ByteTokenizer, 'encode_batch', slow)
  config = _config(_write_corpus(tmp_path), shuffle=False)
  with make_pipeline(config, 'train') as pipeline:
    next(pipeline)
    before = pipeline.wait_seconds
    for _ in range(10):
      time.sleep(0.08)
      next(pipeline)
    # In turn with the caller, the 25 documents would cost half a second.
    assert pipeline.wait_seconds - before < 0.25


def test_waiting_is_counted(tmp_path):
  pipeline = make_pipeline(_config(_write_corpus(tmp_path)), 'train')
  start = time.perf_counter()
  _take(pipeline, 50)
  spent = time.perf_counter() - start
  assert 0 < pipeline.wait_seconds <= spent


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'split': 'test'}, "split='test'"),
    ({'shards': 3}, 'data.batch=4 must be a multiple of the 3 processes'),
    ({'shard': 2, 'shards': 2}, 'shard=2'),
    ({'vocab': 256}, 'has 257 tokens, more than the vocabulary of 256'),
  ],
)
def test_arguments_that_cannot_be_met_are_refused(tmp_path, arguments, message):
  config = _config(_write_corpus(tmp_path, documents=5))
  with pytest.raises(ValueError, match=re.escape(message)):
    make_pipeline(config, **{'split': 'train', **arguments})


def test_a_split_without_documents_is_an_error_that_names_the_share(tmp_path):
  (tmp_path / 'a.txt').write_text('the only one')
  paths = str(tmp_path / 'a.txt')
  with pytest.raises(ValueError, match=r'data\.validation=0 holds out nothing'):
    make_pipeline(_config(paths, validation=0.0), 'validation')
  config = _config(paths, validation=1e-9)
  with (
    make_pipeline(config, 'validation') as pipeline,
    pytest.raises(
      ValueError,
      match=r'validation=1e-09 leaves no document .* or data\.validation=0 to',
    ),
  ):
    next(pipeline)


def test_a_long_text_is_cut_so_that_one_file_can_be_split(tmp_path):
  lines = [f'<{i:03d}> a line of a book\n' for i in range(400)]
  (tmp_path / 'book.txt').write_text(''.join(lines))
  config = _config(str(tmp_path / 'book.txt'), max_document=200, validation=0.2)
  held = ''.join(_texts(_take(make_pipeline(config, 'validation'), 10_000)))
  train = ''.join(_texts(_take(make_pipeline(config, 'train'), 300)))
  held_lines = [line for line in lines if line.strip() in held]
  train_lines = [line for line in lines if line.strip() in train]
  assert 40 < len(held_lines) < 140
  assert not set(held_lines) & set(train_lines)


SETTINGS = st.fixed_dictionaries(
  {},
  optional={
    'source': st.sampled_from(['stdlib', 'text', 'mixture', 'synthetic', 'x']),
    'paths': st.text(max_size=6),
    'column': st.text(max_size=3),
    'mixture': st.lists(
      st.sampled_from(
        ['1:stdlib', '2:text:a', 'nan:stdlib', '1:mixture:x', '1', ':', '-1:a']
      ),
      max_size=3,
    ).map(tuple),
    'tokenizer': st.sampled_from(['bytes', '', 'a.json']),
    'batch': st.integers(-2, 9),
    'length': st.integers(-2, 9),
    'validation': st.floats(),
    'max_document': st.integers(-1, 9),
    'shuffle_tokens': st.integers(-1, 99),
    'seed': st.integers(-(2**40), 2**40),
    'prefetch': st.integers(-1, 5),
  },
)


@settings(max_examples=150, deadline=None)
@given(SETTINGS)
def test_settings_are_accepted_or_refused_in_one_line(values):
  try:
    config = DataConfig(**values)
  except ValueError as error:
    assert 'data.' in str(error)
    assert '\n' not in str(error).replace('\\n', '')
    return
  assert config.batch > 0
  assert config.length > 0
  assert 0 <= config.validation < 1
  assert sum(weight for weight, _ in config.parts()) > 0
  assert all(part.source != 'mixture' for _, part in config.parts())
