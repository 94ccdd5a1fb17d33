"""Held-out loss weighs tokens, not batches."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax.evals import likelihood


class Loss(NamedTuple):
  nll: object
  weight: object


class Model(nn.Module):
  """Its loss per token is the token."""

  def loss(self, batch, deterministic):
    assert deterministic
    weight = jnp.sum(batch['weights'])
    total = jnp.sum(batch['tokens'] * batch['weights'])
    return Loss(total / jnp.maximum(weight, 1e-9), weight)


def batch(tokens, weights):
  return {
    'tokens': jnp.asarray(tokens, jnp.float32),
    'weights': jnp.asarray(weights, jnp.float32),
  }


def test_every_token_counts_the_same_however_batches_are_cut():
  batches = [batch([[1, 2, 3, 9]], [[1, 1, 1, 0]]), batch([[10]], [[1]])]
  found = likelihood.evaluate(Model(), {}, iter(batches), text_bytes=8.0)
  assert found.tokens == 4
  assert found.loss == pytest.approx(4.0)
  assert found.perplexity == pytest.approx(math.exp(4.0))
  assert found.bits_per_byte == pytest.approx(16 / np.log(2) / 8)
  assert set(found.scalars()) == {
    'validation/loss',
    'validation/perplexity',
    'validation/bits_per_byte',
  }


def test_each_source_has_a_loss_of_its_own():
  batches = [
    batch([[1, 3]], [[1, 1]]),
    batch([[9]], [[1]]),
    batch([[5]], [[1]]),
  ]
  names = iter(['books', 'code', 'books'])
  found = likelihood.evaluate(Model(), {}, iter(batches), sources=names)
  assert found.loss == pytest.approx(18 / 4)
  assert found.scalars()['validation/loss/books'] == pytest.approx(3.0)
  assert found.scalars()['validation/loss/code'] == pytest.approx(9.0)
  alone = likelihood.evaluate(Model(), {}, batches, sources=['books'] * 3)
  assert not [name for name in alone.scalars() if 'books' in name]


def test_without_tokens_or_bytes_nothing_is_claimed():
  empty = likelihood.evaluate(Model(), {}, [])
  assert math.isnan(empty.loss)
  assert empty.scalars() == {}
  padding = likelihood.evaluate(Model(), {}, [batch([[3]], [[0]])])
  assert math.isnan(padding.loss)
  some = likelihood.evaluate(Model(), {}, [batch([[3000]], [[1]])])
  assert some.perplexity == math.inf
  assert math.isnan(some.bits_per_byte)
