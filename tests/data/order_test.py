"""The order of units is Grain's shuffle, to the last place."""

import itertools

import grain
import numpy as np
import pytest

from gated_jax.data import order as orders
from gated_jax.data.order import Deal
from gated_jax.data.order import Order
from gated_jax.data.order import permutation


def _grain(count, seed, shard=0, shards=1):
  data = grain.MapDataset.range(count).shuffle(seed)
  return data[shard::shards].repeat()


@pytest.mark.parametrize('count', [1, 2, 3, 97, 5000, 65536, 65538, 300_000])
@pytest.mark.parametrize('seed', [0, 1, 2**31 - 1])
def test_a_permutation_is_grains(count, seed):
  found = permutation(count, seed)
  expected = _grain(count, seed)
  step = max(count // 40, 1)
  assert [int(found[i]) for i in range(0, count, step)] == [
    expected[i] for i in range(0, count, step)
  ]
  np.testing.assert_array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize('part', [1 << 16, 7])
@pytest.mark.parametrize(('count', 'shards'), [(5, 1), (10, 3), (40, 4)])
def test_epochs_are_shuffled_anew_and_dealt_as_grain_does(
  count, shards, part, monkeypatch
):
  monkeypatch.setattr(orders, '_PART', part)
  for shard in range(shards):
    found = Order(Deal(count, 3, shard, shards), epochs=0)
    expected = _grain(count, 3, shard, shards)
    assert found.epoch == len(range(shard, count, shards))
    for place in itertools.chain(range(3 * found.epoch), (50, 2, 49)):
      assert found.unit(place) == expected[place]


def test_without_a_seed_units_come_as_they_are():
  order = Order(Deal(7, -1, 1, 2), epochs=1)
  assert [order.unit(place) for place in range(order.places)] == [1, 3, 5]
