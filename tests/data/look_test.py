"""What `python -m gated_jax.data look` says is what is there."""

import json
import re

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data.look import Count
from gated_jax.data.look import look


@pytest.fixture
def config(tmp_path):
  for name, words in (('a', 'first'), ('b', 'second')):
    lines = [json.dumps({'text': f'{words} {i} ' * 4}) for i in range(50)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'empty.jsonl').write_text('')
  a, b = tmp_path / 'a.jsonl', tmp_path / '[be]*.jsonl'
  return DataConfig(
    source='mixture',
    mixture=(f'3:jsonl:{a}', f'1:jsonl:{b}'),
    length=64,
    batch=4,
    validation=0.2,
  )


def test_all_documents_of_every_source_are_counted(config):
  text = '\n'.join(look(config, 257))
  first, second = re.split(r'\n\n', text)[1:3]
  assert '75.0% of all rows, 1 files' in first
  assert '25.0% of all rows, 1 files' in second
  for part, word in ((first, 'first'), (second, 'second')):
    counts = re.findall(r'([\d,]+) documents, ([\d,]+) tokens', part)
    train, held = np.array(
      [[int(x.replace(',', '')) for x in count] for count in counts]
    )
    # A document has a token for each byte, and one at either end.
    lengths = [len(f'{word} {i} ' * 4) + 2 for i in range(50)]
    assert (train + held).tolist() == [50, sum(lengths)]
    assert 0 < held[0] < 25
    bars = re.findall(r'([\d,]+) to ([\d,]+) +(\d+)', part)
    assert sum(int(number) for *_, number in bars) == train[0]
  assert 'skipped  1 files' in text and 'empty.jsonl: empty' in text


def test_rows_are_shown_with_their_documents_apart(config):
  text = '\n'.join(look(config, 257, rows=1))
  row = text.split('row 0: ')[1].split('\n\n')[0]
  assert row.startswith('64 of 64 are targets')
  pieces = re.findall(r'\| (\d+) to (\d+)  (.*)', row)
  assert int(pieces[0][0]) == 0
  assert int(pieces[-1][1]) == 63
  assert all(len(set(re.findall(r'\d+', text))) <= 2 for _, _, text in pieces)


def test_a_bound_on_tokens_is_said(config):
  text = '\n'.join(look(config, 257, most=10))
  assert text.count('and more that was not read') == 4


def test_a_split_without_documents_is_a_line_and_no_end(tmp_path):
  (tmp_path / 'one.txt').write_text('the only one ' * 40)
  config = DataConfig(
    source='text', paths=f'{tmp_path}/*.txt', validation=1e-9, length=16
  )
  text = '\n'.join(look(config, 257))
  assert '  train: 1 documents, 522 tokens' in text
  assert 'validation: data.validation=1e-09 leaves no document' in text


def test_documents_are_counted_by_powers_of_two():
  counted = Count()
  counted.add(np.array([2, 3, 4, 7, 8]))
  counted.add(np.array([64]))
  rows = [re.split(r' {2,}', line.strip()) for line in counted.histogram()]
  assert [row[:2] for row in rows] == [
    ['2 to 3', '2'],
    ['4 to 7', '2'],
    ['8 to 15', '1'],
    ['16 to 31', '0'],
    ['32 to 63', '0'],
    ['64 to 127', '1'],
  ]
  assert counted.describe().startswith('6 documents, 88 tokens (2 to 64 a')
