"""Data sets of the library `datasets`, in the forms that folders have."""

import dataclasses
import json

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import hub_source
from gated_jax.data.pipeline import make_pipeline

datasets = pytest.importorskip('datasets')

TEXTS = [f'<{i:03d}> some words of a row ' * (1 + i % 3) for i in range(60)]
FORMS = ('json', 'parquet', 'csv', 'text', 'saved', 'saved splits', 'streamed')


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', folder)
  monkeypatch.setattr(hub_source, '_ROWS', 16)


def write(folder, form):
  data = datasets.Dataset.from_dict({'text': TEXTS, 'n': range(len(TEXTS))})
  if form == 'saved':
    data.save_to_disk(folder)
  elif form == 'saved splits':
    datasets.DatasetDict({'train': data, 'test': data}).save_to_disk(folder)
  else:
    folder.mkdir()
    for i in range(3):
      part = data.select(range(20 * i, 20 * i + 20))
      if form == 'text':
        lines = '\n'.join(part['text'])
        (folder / f'{i}.txt').write_text(lines)
      elif form == 'parquet':
        part.to_parquet(folder / f'{i}.parquet')
      elif form == 'csv':
        part.to_csv(folder / f'{i}.csv', index=False)
      else:
        lines = [json.dumps(row) for row in part]
        (folder / f'{i}.jsonl').write_text('\n'.join(lines))


def config_of(folder, **changes):
  settings = {'batch': 4, 'length': 64, 'shuffle_tokens': 512, **changes}
  return DataConfig(source='huggingface', paths=str(folder), **settings)


def batches_of(config, count, **process):
  with make_pipeline(config, 'train', **process) as pipeline:
    return [next(pipeline) for _ in range(count)]


def held_out(config):
  with make_pipeline(config, 'validation') as pipeline:
    ids = np.concatenate([b['tokens'].ravel() for b in pipeline])
  return bytes(i for i in ids.tolist() if i < 256).decode()


@pytest.mark.parametrize('form', FORMS)
def test_every_row_is_a_document_and_resumes(tmp_path, form):
  write(tmp_path / 'd', form)
  config = config_of(tmp_path / 'd', hub_streaming=form == 'streamed')
  all_held_out = {'validation': 1 - 2**-53, 'shuffle': False}
  whole = held_out(dataclasses.replace(config, **all_held_out))
  assert all(whole.count(text[:5]) == text.count('<') for text in TEXTS)
  with make_pipeline(config, 'train') as pipeline:
    for _ in range(7):
      next(pipeline)
    state, wanted = pipeline.state(), [next(pipeline) for _ in range(3)]
  with make_pipeline(config, 'train') as again:
    again.restore(state)
    for batch in wanted:
      for name, array in next(again).items():
        np.testing.assert_array_equal(array, batch[name])


@pytest.mark.parametrize('streaming', [False, True])
def test_processes_share_the_rows(tmp_path, streaming):
  write(tmp_path / 'd', 'json')
  config = config_of(
    tmp_path / 'd', hub_streaming=streaming, validation=0, shuffle=False
  )
  seen = []
  for shard in range(2):
    ids = [
      batch['tokens'].tobytes()
      for batch in batches_of(config, 6, shard=shard, shards=2)
    ]
    seen.append(set(ids))
  assert not seen[0] & seen[1]


def test_another_data_set_of_the_name_is_refused(tmp_path):
  write(tmp_path / 'd', 'json')
  config = config_of(tmp_path / 'd')
  with make_pipeline(config, 'train') as pipeline:
    state = pipeline.state()
  path = tmp_path / 'd/0.jsonl'
  path.write_text(path.read_text().replace('<000>', '<999>'))
  with (
    make_pipeline(config, 'train') as again,
    pytest.raises(ValueError, match='cannot be continued exactly'),
  ):
    again.restore(state)


def test_rows_without_text_are_skipped_and_counted(tmp_path):
  (tmp_path / 'd').mkdir()
  rows = [json.dumps({'text': text}) for text in [*TEXTS, None]]
  (tmp_path / 'd/a.jsonl').write_text('\n'.join(rows))
  with make_pipeline(config_of(tmp_path / 'd'), 'train') as pipeline:
    for _ in range(20):
      next(pipeline)
    (reason,) = pipeline.skipped.values()
  assert reason == 'a NoneType, not a string'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'column': 'words'}, "has no column 'words', only text, n"),
    ({'column': 'n'}, "column 'n' .* is int64, not string"),
    ({'hub_split': 'dev'}, "with data.hub_split='dev'.*"),
    ({'hub_subset': 'x'}, "data.hub_subset='x'"),
    ({'paths': 'no/such/folder'}, "data.paths='no/such/folder'"),
  ],
)
def test_what_is_not_there_is_named(tmp_path, changes, message, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  write(tmp_path / 'd', 'json')
  config = dataclasses.replace(config_of(tmp_path / 'd'), **changes)
  with pytest.raises(ValueError, match=message) as caught:
    make_pipeline(config, 'train')
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('fields', ['messages', 'prompt'])
def test_rows_may_be_conversations(tmp_path, streaming, fields):
  (tmp_path / 'd').mkdir()
  rows = []
  for text in ['', *TEXTS]:
    turns = [
      {'role': 'user', 'content': '?'},
      {'role': 'assistant', 'content': text},
    ]
    prompt = {'prompt': '?', 'completion': text}
    rows.append({'messages': turns} if fields == 'messages' else prompt)
  path = tmp_path / 'd/a.jsonl'
  path.write_text('\n'.join(json.dumps({**row, 'n': 1}) for row in rows))
  settings = {'batch': 2, 'length': 64, 'shuffle': False, 'rows': 'whole'}
  hub = DataConfig(
    source='huggingface',
    paths=str(tmp_path / 'd'),
    column='messages',
    hub_streaming=streaming,
    targets='last',
    **settings,
  )
  plain = DataConfig(
    source='conversations', paths=str(path), targets='last', **settings
  )
  wanted = batches_of(plain, 20)
  with make_pipeline(hub, 'train') as pipeline:
    for batch in wanted[:9]:
      np.testing.assert_array_equal(next(pipeline)['weights'], batch['weights'])
    state = pipeline.state()
    (reason,) = pipeline.skipped.values()
  with make_pipeline(hub, 'train') as again:
    again.restore(state)
    for batch in wanted[9:]:
      for name, array in next(again).items():
        np.testing.assert_array_equal(array, batch[name])
  assert reason == 'message 1 (assistant) says nothing'


def test_columns_that_make_no_conversation_are_named(tmp_path):
  write(tmp_path / 'd', 'json')
  with pytest.raises(
    ValueError, match=r"/d' has no column 'messages', and not"
  ):
    make_pipeline(config_of(tmp_path / 'd', column='messages'), 'train')


def test_its_settings_are_refused_elsewhere():
  with pytest.raises(ValueError, match=r"data\.hub_split='test' does nothing"):
    DataConfig(hub_split='test')
