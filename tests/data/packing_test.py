"""Rows hold every pair of neighbours in a document once, and nothing else."""

import collections
import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.data.packing import JoinedRows
from gated_jax.data.packing import PackedRows
from gated_jax.data.packing import pack_row


class _List(grain.IterDataset):
  """Documents from a list; the position is an index."""

  def __init__(self, documents):
    super().__init__()
    self._documents = documents

  def __iter__(self):
    return _ListIterator(self._documents)


class _ListIterator(grain.DatasetIterator):
  def __init__(self, documents):
    super().__init__()
    self._documents = documents
    self._place = 0

  def __next__(self):
    if self._place == len(self._documents):
      raise StopIteration
    self._place += 1
    return self._documents[self._place - 1]

  def get_state(self):
    return {'place': self._place}

  def set_state(self, state):
    self._place = state['place']


def _documents(lengths):
  """Documents in which no two tokens are the same."""
  starts = np.cumsum([0, *lengths])
  return [
    np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)
  ]


def test_a_row_is_written_as_one_would_by_hand():
  row = pack_row([np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)], 5)
  assert row['tokens'].tolist() == [5, 6, 8, 0, 0]
  assert row['targets'].tolist() == [6, 7, 9, 0, 0]
  assert row['segments'].tolist() == [1, 1, 2, 0, 0]
  assert row['positions'].tolist() == [0, 1, 0, 0, 0]
  assert row['weights'].tolist() == [1, 1, 1, 0, 0]
  assert {v.dtype.name for v in row.values()} == {'int32', 'float32'}


def test_a_chunk_that_goes_on_in_the_next_row_is_a_new_segment_there():
  rows = list(PackedRows(_List(_documents([3, 6])), 4))
  assert [r['segments'].tolist() for r in rows] == [[1, 1, 2, 2], [1, 1, 1, 0]]
  assert [r['positions'].tolist() for r in rows] == [[0, 1, 0, 1], [0, 1, 2, 0]]
  # The target of the last place of row 0 is the first token of row 1.
  assert rows[0]['targets'][-1] == rows[1]['tokens'][0] == 5


@settings(max_examples=50, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
  length=st.integers(1, 17),
)
def test_every_pair_of_neighbours_appears_exactly_once(lengths, length):
  documents = _documents(lengths)
  wanted = collections.Counter(
    (int(a), int(b)) for d in documents for a, b in itertools.pairwise(d)
  )
  found = collections.Counter()
  rows = list(PackedRows(_List(documents), length))
  for row in rows:
    for i in np.flatnonzero(row['weights']):
      found[int(row['tokens'][i]), int(row['targets'][i])] += 1
  assert found == wanted
  # Full rows, all but the last.
  assert all(row['weights'].all() for row in rows[:-1])


@settings(max_examples=50, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
  length=st.integers(1, 17),
)
def test_segments_are_runs_of_one_document_with_positions_from_zero(
  lengths, length
):
  documents = _documents(lengths)
  owner = np.repeat(np.arange(len(documents)), lengths)
  for row in PackedRows(_List(documents), length):
    segments, position, previous = row['segments'], 0, 0
    for i in range(length):
      if segments[i] == 0:
        assert row['weights'][i] == 0
        assert not segments[i:].any()
        break
      position = position + 1 if segments[i] == previous else 0
      assert row['positions'][i] == position
      inside = segments == segments[i]
      assert len(set(owner[row['tokens'][inside]])) == 1
      previous = segments[i]


def test_joined_rows_are_written_as_one_would_by_hand():
  documents = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
  plain = list(JoinedRows(_List(documents), 3, -1))
  assert [r['tokens'].tolist() for r in plain] == [[5, 6, 7], [8, 0, 0]]
  assert [r['targets'].tolist() for r in plain] == [[6, 7, 8], [9, 0, 0]]
  assert [r['weights'].tolist() for r in plain] == [[1, 1, 1], [1, 0, 0]]
  first = list(JoinedRows(_List(documents), 3, 4))
  assert [r['tokens'].tolist() for r in first] == [[4, 5, 6], [4, 8, 0]]
  assert [r['targets'].tolist() for r in first] == [[5, 6, 7], [8, 9, 0]]
  assert [r['weights'].tolist() for r in first] == [[1, 1, 1], [1, 1, 0]]


@settings(max_examples=50, deadline=None)
@given(
  lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
  length=st.integers(1, 17),
  first=st.sampled_from([-1, 10**6]),
)
def test_joined_rows_are_the_stream_and_predict_each_id_once(
  lengths, length, first
):
  stream = np.arange(sum(lengths))
  rows = list(JoinedRows(_List(_documents(lengths)), length, first))
  weights = [row['weights'].astype(bool) for row in rows]
  targets = [row['targets'][w] for row, w in zip(rows, weights, strict=True)]
  wanted = stream if first >= 0 else stream[1:]
  assert np.concatenate([*targets, []]).tolist() == wanted.tolist()
  for row, used in zip(rows, weights, strict=True):
    assert set(row) == {'tokens', 'targets', 'weights'}
    assert used[: used.sum()].all()
    tokens, after = row['tokens'][used], row['targets'][used]
    assert tokens[0] == (first if first >= 0 else after[0] - 1)
    assert (tokens[1:] == after[:-1]).all()
  assert all(used.all() for used in weights[:-1])


@pytest.mark.parametrize('first', [-1, 99])
@pytest.mark.parametrize('length', [1, 3, 8])
def test_joined_rows_resume_from_every_position(length, first):
  data = JoinedRows(_List(_documents([2, 9, 1, 3, 25, 2, 8])), length, first)
  _check_resumes(data)


@pytest.mark.parametrize('length', [1, 3, 8])
def test_every_position_can_be_saved_as_json_and_resumed(length):
  _check_resumes(PackedRows(_List(_documents([2, 9, 3, 25, 2, 2, 8])), length))


def _check_resumes(data):
  iterator = data.__iter__()
  states, rows = [iterator.get_state()], []
  for row in iterator:
    rows.append(row)
    states.append(iterator.get_state())
  for i, state in enumerate(states):
    again = data.__iter__()
    again.set_state(json.loads(json.dumps(state)))
    rest = list(again)
    assert len(rest) == len(rows) - i
    for a, b in zip(rest, rows[i:], strict=True):
      for key, value in a.items():
        np.testing.assert_array_equal(value, b[key])
