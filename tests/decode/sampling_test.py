"""Filters and draws are what they say."""

import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.decode.sampling import Sampling
from gated_jax.decode.sampling import choose
from gated_jax.decode.sampling import filter_logits
from gated_jax.decode.sampling import ids_without_token

LOGITS = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05]], np.float32))
KEPT = [
  (Sampling(1.0), 5),
  (Sampling(1.0, top_k=2), 2),
  (Sampling(1.0, top_k=9), 5),
  (Sampling(1.0, top_p=0.69), 2),
  (Sampling(1.0, top_p=0.71), 3),
  (Sampling(1.0, top_p=0.001), 1),
  (Sampling(1.0, min_p=0.3), 3),
  (Sampling(1.0, min_p=1.0), 1),
  # Half the temperature squares p: 0.16, 0.09, 0.0225, ... of 0.285.
  (Sampling(0.5, top_p=0.87), 2),
  # top_p counts what top_k left: 0.4 / 0.85 and 0.3 / 0.85.
  (Sampling(1.0, top_k=3, top_p=0.81), 2),
]


@pytest.mark.parametrize(('sampling', 'count'), KEPT, ids=str)
def test_filters_keep_the_likeliest(sampling, count):
  order = np.array([3, 0, 4, 2, 1])  # the likeliest need not come first
  kept = np.isfinite(filter_logits(jnp.asarray(LOGITS[:, order]), sampling))[0]
  np.testing.assert_array_equal(kept, order < count)


def test_draws_follow_the_probabilities():
  sampling = Sampling(temperature=1.0, top_k=3)
  logits = jnp.tile(LOGITS, (4000, 1))
  draws = np.asarray(choose(logits, jnp.uint32(0), jnp.int32(0), sampling))
  share = np.bincount(draws, minlength=5) / 4000
  expected = np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85
  assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 4000)
  assert not share[3:].any()


@pytest.mark.parametrize(
  'options', [{'temperature': -1}, {'top_k': -1}, {'top_p': 0}, {'min_p': 2}]
)
def test_impossible_sampling_is_refused(options):
  (name,) = options
  with pytest.raises(ValueError, match=f'{name}='):
    Sampling(**options)


@pytest.mark.parametrize(
  ('known', 'vocab', 'ranges'),
  [
    ([1, 1, 1], 3, ()),
    ([1, 1, 1], 5, ((3, 5),)),
    ([1, 0, 0, 1, 0, 1], 6, ((1, 3), (4, 5))),
    ([0, 1, 1, 0], 3, ((0, 1),)),
    ([], 2, ((0, 2),)),
  ],
)
def test_ranges_are_the_ids_that_no_token_has(known, vocab, ranges):
  assert ids_without_token(np.array(known, bool), vocab) == ranges


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_an_id_without_a_token_is_not_chosen_though_likeliest(temperature):
  logits = jnp.zeros((64, 6)).at[:, 5].set(30.0).at[:, 0].set(20.0)
  sampling = Sampling(temperature=temperature, top_k=1, never=((0, 2), (5, 6)))
  drawn = choose(logits, jnp.uint32(0), jnp.int32(0), sampling)
  assert set(np.asarray(drawn).tolist()) <= {2, 3, 4}
