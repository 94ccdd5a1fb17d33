"""Rows hold every pair of neighbours in a document once, and nothing else."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.data.documents import Chunk
from gated_jax.data.finish import finish
from gated_jax.data.packing import CutRows
from gated_jax.data.packing import JoinedRows


class _Documents:
  """Documents from a list, some in each chunk; a chunk is a unit's."""

  def __init__(self, documents, per_chunk=1):
    self._documents = documents
    self._per_chunk = per_chunk
    self.seek(0, 0)

  def seek(self, place, cursor):
    self._begin = place * self._per_chunk + cursor

  def __iter__(self):
    return self

  def __next__(self):
    place, cursor = divmod(self._begin, self._per_chunk)
    end = (place + 1) * self._per_chunk
    chosen = self._documents[self._begin : end]
    if not chosen:
      raise StopIteration
    self._begin = end
    return Chunk(
      np.concatenate(chosen),
      np.array([len(ids) for ids in chosen]),
      place,
      cursor + np.arange(len(chosen)),
      cursor + len(chosen),
    )


def _documents(lengths):
  """Documents in which no two tokens are the same."""
  starts = np.cumsum([0, *lengths])
  return [
    np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)
  ]


def _take(stream, sizes):
  """Rows until there are none, in takes of these sizes again and again."""
  rows = []
  for size in itertools.cycle(sizes):
    taken = stream.take(size)
    arrays = finish(taken)
    for i, filled in enumerate(taken.filled.tolist()):
      row = {name: value[i] for name, value in arrays.items()}
      weights = row.pop('weights')
      assert weights.tolist() == [1.0] * filled + [0.0] * (
        len(weights) - filled
      )
      rows.append((row, filled))
    if len(taken.filled) < size:
      return rows


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=20)
SHAPES = st.tuples(
  st.integers(1, 17),  # length of a row
  st.integers(1, 4),  # documents in a chunk
  st.lists(st.integers(1, 5), min_size=1, max_size=3),  # rows in a take
)


def _cut(lengths, shape):
  length, per_chunk, sizes = shape
  documents = _documents(lengths)
  rows = _take(CutRows(_Documents(documents, per_chunk), length), sizes)
  return documents, rows


def test_a_row_is_written_as_one_would_by_hand():
  documents = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
  ((row, filled),) = _take(CutRows(_Documents(documents), 5), [2])
  assert row['tokens'].tolist() == [5, 6, 8, 0, 0]
  assert row['targets'].tolist() == [6, 7, 9, 0, 0]
  assert row['segments'].tolist() == [1, 1, 2, 0, 0]
  assert row['positions'].tolist() == [0, 1, 0, 0, 0]
  assert filled == 3
  assert {value.dtype.name for value in row.values()} == {'int32'}


def test_a_chunk_that_goes_on_in_the_next_row_is_a_new_segment_there():
  _, rows = _cut([3, 6], (4, 1, [1]))
  assert [r['segments'].tolist() for r, _ in rows] == [
    [1, 1, 2, 2],
    [1, 1, 1, 0],
  ]
  assert [r['positions'].tolist() for r, _ in rows] == [
    [0, 1, 0, 1],
    [0, 1, 2, 0],
  ]
  # The target of the last place of row 0 is the first token of row 1.
  assert rows[0][0]['targets'][-1] == rows[1][0]['tokens'][0] == 5


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SHAPES)
def test_every_pair_of_neighbours_appears_exactly_once(lengths, shape):
  documents, rows = _cut(lengths, shape)
  wanted = collections.Counter(
    (int(a), int(b)) for d in documents for a, b in itertools.pairwise(d)
  )
  found = collections.Counter()
  for row, filled in rows:
    for i in range(filled):
      found[int(row['tokens'][i]), int(row['targets'][i])] += 1
  assert found == wanted
  # Full rows, all but the last.
  assert all(filled == shape[0] for _, filled in rows[:-1])


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SHAPES)
def test_segments_are_runs_of_one_document_with_positions_from_zero(
  lengths, shape
):
  _, rows = _cut(lengths, shape)
  owner = np.repeat(np.arange(len(lengths)), lengths)
  for row, filled in rows:
    segments, position, previous = row['segments'], 0, 0
    assert not segments[filled:].any()
    for i in range(filled):
      assert segments[i] - previous in (0, 1)
      position = position + 1 if segments[i] == previous else 0
      assert row['positions'][i] == position
      inside = segments == segments[i]
      assert len(set(owner[row['tokens'][inside]])) == 1
      previous = segments[i]


def test_joined_rows_are_written_as_one_would_by_hand():
  documents = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)]
  plain = _take(JoinedRows(_Documents(documents), 3, -1), [1])
  assert [r['tokens'].tolist() for r, _ in plain] == [[5, 6, 7], [8, 0, 0]]
  assert [r['targets'].tolist() for r, _ in plain] == [[6, 7, 8], [9, 0, 0]]
  assert [filled for _, filled in plain] == [3, 1]
  first = _take(JoinedRows(_Documents(documents), 3, 4), [1])
  assert [r['tokens'].tolist() for r, _ in first] == [[4, 5, 6], [4, 8, 0]]
  assert [r['targets'].tolist() for r, _ in first] == [[5, 6, 7], [8, 9, 0]]
  assert [filled for _, filled in first] == [3, 2]


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.integers(1, 40), min_size=1, max_size=20),
  SHAPES,
  st.sampled_from([-1, 10**6]),
)
def test_joined_rows_are_the_stream_and_predict_each_id_once(
  lengths, shape, first
):
  length, per_chunk, sizes = shape
  stream = np.arange(sum(lengths))
  rows = _take(
    JoinedRows(_Documents(_documents(lengths), per_chunk), length, first), sizes
  )
  targets = [row['targets'][:filled] for row, filled in rows]
  wanted = stream if first >= 0 else stream[1:]
  assert np.concatenate([*targets, []]).tolist() == wanted.tolist()
  for row, filled in rows:
    assert set(row) == {'tokens', 'targets'}
    tokens, after = row['tokens'][:filled], row['targets'][:filled]
    assert tokens[0] == (first if first >= 0 else after[0] - 1)
    assert (tokens[1:] == after[:-1]).all()
    assert not row['tokens'][filled:].any()
    assert not row['targets'][filled:].any()
  assert all(filled == length for _, filled in rows[:-1])


KINDS = {
  'cut': CutRows,
  'joined': lambda documents, length: JoinedRows(documents, length, -1),
  'joined, first': lambda documents, length: JoinedRows(documents, length, 99),
}


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=30, deadline=None)
@given(LENGTHS, SHAPES)
def test_every_position_can_be_resumed(kind, lengths, shape):
  length, per_chunk, _ = shape
  make = KINDS[kind]

  def stream():
    return make(_Documents(_documents(lengths), per_chunk), length)

  whole, places, rows = stream(), [], []
  while True:
    places.append(whole.position())
    taken = whole.take(1)
    if not len(taken.filled):
      break
    rows.append(finish(taken))
  again = stream()
  for i, place in enumerate(places):
    again.seek(place)
    rest = again.take(len(rows))
    assert len(rest.filled) == len(rows) - i
    for name, value in finish(rest).items():
      wanted = [row[name][0] for row in rows[i:]]
      assert value.tolist() == [row.tolist() for row in wanted]
