"""The pass key task: what is asked, and what counts as found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax.evals import retrieval


def encode(text):
  return list(text.encode())


def text(tokens):
  return bytes(tokens.tolist()).decode()


class Oracle(nn.Module):
  """Knows the targets, but for the last digit of rows chosen by `wrong`."""

  wrong: tuple[int, ...] = ()

  def __call__(self, batch):
    logits = jax.nn.one_hot(batch['targets'], 128) * 50
    if self.wrong:
      logits = logits.at[jnp.array(self.wrong), -1].set(0.0)
    return logits


def test_a_row_hides_its_number_once_and_asks_for_it_at_the_end():
  batch = retrieval.hide(encode, 400, 0.5, 3, np.random.default_rng(0))
  keys = set()
  for row in range(3):
    whole = text(np.append(batch['tokens'][row], batch['targets'][row, -1]))
    answer = text(batch['targets'][row][batch['weights'][row] == 1])
    assert len(answer) == 6
    assert answer.startswith(' ')
    assert whole.endswith('The pass key is' + answer)
    assert whole.count(answer) == 2
    assert 120 < whole.index(f'The pass key is{answer}. Remember it.') < 280
    keys.add(answer)
  assert len(keys) == 3
  np.testing.assert_array_equal(
    batch['tokens'][:, 1:], batch['targets'][:, :-1]
  )


@pytest.mark.parametrize('depth, low, high', [(0.0, 0, 0), (1.0, 800, 960)])
def test_depth_places_the_needle(depth, low, high):
  batch = retrieval.hide(encode, 1000, depth, 1, np.random.default_rng(0))
  place = text(batch['tokens'][0]).index('Remember') - len(
    'The pass key is 12345. '
  )
  assert low <= place <= high


def test_a_row_counts_only_when_its_whole_answer_is_right():
  results = [
    retrieval.passkey(
      Oracle(wrong), {}, encode, lengths=(128, 200), depths=(0.0, 1.0), rows=4
    )
    for wrong in ((), (1,), (0, 1, 2, 3))
  ]
  for found, accuracy in zip(results, (1.0, 0.75, 0.0), strict=True):
    np.testing.assert_array_equal(found.accuracy, np.full((2, 2), accuracy))
  assert results[0].nats.max() < 1e-3 < results[1].nats.min()
  assert results[1].scalars() == {
    'retrieval/128': 0.75,
    'retrieval/200': 0.75,
  }


def test_a_length_without_room_is_refused_with_what_it_takes():
  with pytest.raises(ValueError, match=r'length=40 .* take 78 tokens'):
    retrieval.hide(encode, 40, 0.5, 1, np.random.default_rng(0))
