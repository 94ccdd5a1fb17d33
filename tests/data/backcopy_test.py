"""Sequences of the backcopy task, and what a layer that reads them does."""

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.data import backcopy
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.sources import Skipped

VOCAB, LENGTH = 65, 40


def source(seed=0, vocab=VOCAB):
  return backcopy.BackcopySource(vocab, LENGTH, seed, Skipped())


def test_what_follows_a_trigger_is_what_stood_before_it():
  rows = source().draw(np.random.default_rng(0))
  assert rows.shape == (256, LENGTH + 1)
  assert rows.min() == 0
  assert rows.max() == VOCAB - 1
  np.testing.assert_array_equal(np.argwhere(rows == 0)[:, 1], [0] * 256)
  before, at, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
  triggers = (at <= backcopy.TRIGGERS) & (before > 0)
  assert 0.05 < triggers.mean() < 0.6
  np.testing.assert_array_equal(after[triggers], before[triggers])
  # Elsewhere the table decides, which copies by chance alone.
  assert (after == before)[~triggers].mean() < 0.3


def test_other_symbols_are_followed_by_few_others_and_always_the_same():
  first, second = (source().draw(np.random.default_rng(i)) for i in (0, 1))

  def counts(rows):
    table = np.zeros((VOCAB, VOCAB))
    np.add.at(table, (rows[:, 1:-1], rows[:, 2:]), 1)
    return table[backcopy.TRIGGERS + 1 :]

  one, two = counts(first), counts(second)
  common = one.sum(1) > 100
  assert common.sum() > 10
  np.testing.assert_array_equal(
    one[common].argmax(1)[:5] > 0, two[common].argmax(1)[:5] > 0
  )
  shares = [x[common] / x[common].sum(1, keepdims=True) for x in (one, two)]
  assert np.abs(shares[0] - shares[1]).max() < 0.25
  assert (np.sort(shares[0])[:, -8:].sum(1) > 0.7).mean() > 0.9


def test_a_unit_goes_on_where_it_stopped_and_a_seed_is_another_table():
  one = source()
  unit = one.units[3]
  whole = [d.ids for _, d in one.read(unit, 0)]
  rest = [d.ids for _, d in one.read(unit, unit.begin + 250)]
  np.testing.assert_array_equal(whole[250:], rest)
  other = [d.ids for _, d in source(1).read(unit, 0)]
  assert not np.array_equal(whole, other)


def test_each_sequence_is_a_row():
  data = DataConfig(source='backcopy', batch=4, length=LENGTH, validation=0.1)
  with make_pipeline(data, 'train', vocab=VOCAB) as batches:
    batch = next(iter(batches))
  assert (batch['tokens'][:, 0] == 0).all()
  assert (batch['tokens'][:, 1:] > 0).all()
  assert (batch['segments'] == 1).all()
  assert batch['weights'].all()


def test_a_vocabulary_without_other_symbols_is_refused():
  with pytest.raises(ValueError, match=r'more than 17 ids.*model.vocab=17'):
    source(vocab=17)
