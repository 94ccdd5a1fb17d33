"""Any run goes on exactly: every source, rows, threads and processes.

What is read ahead, and by how many threads, may differ before and after.
"""

import dataclasses
import json

import numpy as np
import pyarrow
import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from pyarrow import parquet

from gated_jax.config import DataConfig
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.train_tokenizer import train_tokenizer

VOCAB = 300
SOURCES = (
  'text', 'jsonl', 'bytes', 'parquet', 'array_record', 'tokens',
  'conversations', 'mixture',
)  # fmt: skip


def answer(text):
  return {'role': 'assistant', 'content': text}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Settings that read the same kind of documents from every kind of file."""
  folder = tmp_path_factory.mktemp('corpus')
  texts = [f'document {i} says words ' * (1 + i % 9) for i in range(90)]
  train_tokenizer(iter(texts), VOCAB, folder)
  for i in range(3):
    part = texts[30 * i : 30 * i + 30]
    (folder / f'{i}.txt').write_text('\n'.join(part))
    lines = [json.dumps({'text': text}) for text in part]
    (folder / f'{i}.jsonl').write_text('\n'.join(lines))
    ids = [[(7 * i + k) % 250 + 1 for k in range(len(t) // 4)] for t in part]
    talks = [
      {'messages': [{'role': 'user', 'content': t[:20]}, answer(t)]}
      for t in part
    ]
    (folder / f'{i}.chat').write_text('\n'.join(map(json.dumps, talks)))
    array = np.concatenate([[*row, 0] for row in ids]).astype(np.uint16)
    np.save(folder / f'{i}.npy', array)
    rows = pyarrow.table({'text': part})
    parquet.write_table(rows, folder / f'{i}.parquet', row_group_size=20)
    writer = array_record_module.ArrayRecordWriter(
      f'{folder}/{i}.record', 'group_size:1'
    )
    for text in part:
      writer.write(text.encode())
    writer.close()
  plain = DataConfig(
    batch=4,
    length=48,
    shuffle_tokens=384,
    max_document=100,
    validation=0.1,
    eos=0,
    tokenizer=str(folder / 'tokenizer.json'),
  )
  files = {
    'text': f'{folder}/*.txt',
    'jsonl': f'{folder}/*.jsonl',
    'tokens': f'{folder}/*.npy',
    'conversations': f'{folder}/*.chat',
    'parquet': f'{folder}/*.parquet',
    'array_record': f'{folder}/*.record',
  }
  configs = {
    kind: dataclasses.replace(plain, source=kind, paths=paths)
    for kind, paths in files.items()
  }
  configs['bytes'] = dataclasses.replace(configs['jsonl'], tokenizer='bytes')
  configs['mixture'] = dataclasses.replace(
    plain,
    source='mixture',
    mixture=(
      f'2:jsonl:{files["jsonl"]}',
      f'1:tokens:{files["tokens"]}',
      f'1:conversations:{files["conversations"]}',
    ),
  )
  return configs


@settings(max_examples=25, deadline=None)
@given(
  source=st.sampled_from(SOURCES),
  rows=st.sampled_from(['cut', 'joined', 'whole']),
  shuffle=st.booleans(),
  processes=st.integers(1, 2),
  workers=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  prefetch=st.tuples(st.integers(1, 9), st.integers(1, 9)),
  steps=st.integers(0, 14),
)
def test_a_run_goes_on_exactly(
  sources, source, rows, shuffle, processes, workers, prefetch, steps
):
  config = dataclasses.replace(sources[source], rows=rows, shuffle=shuffle)
  for shard in range(processes):
    before, after = (
      make_pipeline(
        dataclasses.replace(config, workers=count, prefetch=ahead),
        'train',
        shard=shard,
        shards=processes,
        vocab=VOCAB,
      )
      for count, ahead in zip(workers, prefetch, strict=True)
    )
    with before, after:
      for _ in range(steps):
        next(before)
      after.restore(before.state())
      for _ in range(3):
        batch, again = next(before), next(after)
        assert set(batch) == set(again)
        for name, array in batch.items():
          np.testing.assert_array_equal(again[name], array)
      assert after.state() == before.state()
