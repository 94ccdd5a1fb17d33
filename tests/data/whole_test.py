"""Documents that fit into a row lie in one, alone in their segment."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from gated_jax.data.documents import Chunk
from gated_jax.data.finish import finish
from gated_jax.data.packing import Position
from gated_jax.data.whole import WholeRows
from gated_jax.data.whole import best_fit


class Documents:
  """Documents from a list, of which a chunk has `size`, wherever it begins."""

  def __init__(self, lengths, size):
    starts = np.cumsum([0, *lengths])
    self._all = [
      np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)
    ]
    self._size, self._at = size, 0

  def seek(self, place, cursor):
    assert place == 0
    self._at = cursor

  def __next__(self):
    chosen = self._all[self._at : self._at + self._size]
    if not chosen:
      raise StopIteration
    before = self._at + np.arange(len(chosen))
    self._at += len(chosen)
    lengths = np.array([len(ids) for ids in chosen])
    return Chunk(np.concatenate(chosen), lengths, 0, before, self._at)


def take_all(stream, sizes):
  """The position before each take, and its rows, until there are none."""
  for size in itertools.cycle(sizes):
    position = stream.position()
    rows = stream.take(size)
    yield position, rows
    if not len(rows.filled):
      return


def segments_of(rows):
  """(tokens, targets) of every segment, row by row."""
  arrays = finish(rows)
  for i, filled in enumerate(rows.filled.tolist()):
    number, position = arrays['segments'][i], arrays['positions'][i]
    assert (number[:filled] > 0).all() and not number[filled:].any()
    assert arrays['weights'][i].tolist() == (number > 0).tolist()
    for segment in range(1, number.max() + 1):
      own = number == segment
      assert position[own].tolist() == list(range(own.sum()))
      assert (np.diff(np.flatnonzero(own)) == 1).all()
      yield arrays['tokens'][i][own], arrays['targets'][i][own]


LENGTHS = st.lists(st.integers(2, 40), min_size=2, max_size=25)
TAKES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 30), TAKES, st.integers(1, 5))
def test_documents_are_whole_or_cut_every_row(lengths, length, takes, size):
  lengths = [*lengths, 2]  # one at least fits
  stream = WholeRows(Documents([2, *lengths], size), length)
  seen = []
  for (_, rows), most in zip(
    take_all(stream, takes), itertools.cycle(takes), strict=False
  ):
    assert len(rows.filled) <= most
    seen += [(t.tolist(), y.tolist()) for t, y in segments_of(rows)]
  wanted = []
  starts = np.cumsum([0, 2, *lengths])
  for a, b in itertools.pairwise(starts.tolist()):
    for begin in range(a, b - 1, length):
      end = min(begin + length, b - 1)
      wanted.append((list(range(begin, end)), list(range(begin + 1, end + 1))))
  assert sorted(seen) == wanted


@settings(max_examples=200, deadline=None)
@given(
  LENGTHS,
  st.integers(2, 30),
  TAKES,
  st.integers(1, 5),
  st.integers(1, 5),
  st.data(),
)
def test_a_position_gives_the_same_rows_however_documents_are_read(
  lengths, length, takes, size, other, data
):
  lengths = [2, *lengths]
  whole = list(take_all(WholeRows(Documents(lengths, size), length), takes))
  again = WholeRows(Documents(lengths, other), length)
  start = data.draw(st.integers(0, len(whole) - 1))
  again.seek(Position(*whole[start][0]))
  turns = itertools.islice(itertools.cycle(takes), start, None)
  for (_, wanted), most in zip(whole[start:], turns, strict=False):
    rows = again.take(most)
    for a, b in zip(rows, wanted, strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_window_is_packed_as_one_would_by_hand():
  rows = WholeRows(Documents([4, 6, 3, 3, 9, 5], 2), 5).take(3)
  # Pairs: 3, 5, 2, 2, then 5 and a rest of 3. A fifth would be 17 in 15 places.
  arrays = finish(rows)
  assert rows.filled.tolist() == [5, 5, 2]
  segments = [tokens.tolist() for tokens, _ in segments_of(rows)]
  assert segments == [[4, 5, 6, 7, 8], [0, 1, 2], [10, 11], [13, 14]]
  assert {value.shape for value in arrays.values()} == {(3, 5)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_fills_no_row_beyond_its_room(sizes):
  rows = best_fit(sizes, 20)
  filled = np.bincount(rows, sizes)
  assert filled.max() <= 20 and filled.min() > 0
  # At most one row is half empty, else two of them would have been one.
  assert (filled <= 10).sum() <= 1


def test_little_is_padding_where_windows_are_large():
  lengths = np.random.default_rng(0).integers(2, 400, 3000).tolist()
  stream = WholeRows(Documents(lengths, 64), 512)
  rows = [stream.take(256) for _ in range(4)]
  filled = np.concatenate([r.filled for r in rows])
  assert len(filled) == 4 * 256
  assert 1 - filled.mean() / 512 < 0.01


def test_documents_that_are_all_longer_than_a_row_are_refused():
  stream = WholeRows(Documents([40, 50, 60] * 30, 1), 16)
  with pytest.raises(
    ValueError, match=r'longer than data\.length=16, and keep'
  ):
    for _ in range(40):
      stream.take(8)
  # The first documents of a source may be held out.
  later = Documents([2, *[40, 50, 60] * 30], 1)
  next(later)
  later.seek = lambda place, cursor: None
  stream = WholeRows(later, 16)
  with pytest.raises(ValueError, match=r'longer than data\.length=16'):
    stream.take(400)


@pytest.mark.parametrize('place', [0, 1, 60])
def test_one_document_that_fits_among_the_first_is_enough(place):
  lengths = [60] * 100
  lengths[place] = 10
  stream = WholeRows(Documents(lengths, 1), 16)
  taken = [len(stream.take(4).filled) for _ in range(90)]
  assert taken == [4] * 90
