"""Rows of a table, and the gradient of a row that many tokens share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.embed import EmbedSpec
from gated_jax.ops.embed import embed
from gated_jax.ops.embed import embed_with_inlet
from gated_jax.ops.embed import unsharded
from gated_jax.ops.loss import LossSpec
from gated_jax.ops.loss import cross_entropy

V, D = 6, 4
TABLE = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def gradient(table, tokens, incoming, spec=EmbedSpec()):
  tokens = jnp.asarray(tokens)
  _, pull = jax.vjp(lambda t: embed(t, tokens, spec), jnp.asarray(table))
  return np.asarray(pull(jnp.asarray(incoming))[0])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_token_gets_its_row_in_the_dtype_asked_for(dtype):
  tokens = np.array([[5, 0, 0], [2, 3, 5]])
  found = jax.jit(lambda t, ids: embed(t, ids, EmbedSpec(dtype)))(TABLE, tokens)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, TABLE.astype(dtype)[tokens])


def test_a_token_that_is_none_has_zeros_and_teaches_nothing():
  tokens = np.array([[-1, V, 2, 2**31 - 1]])
  found = np.asarray(embed(jnp.asarray(TABLE), jnp.asarray(tokens)))
  np.testing.assert_array_equal(found[0, 2], TABLE[2])
  assert not found[0, [0, 1, 3]].any()
  moved = gradient(TABLE, tokens, np.ones((1, 4, D), np.float32))
  np.testing.assert_array_equal(moved, np.eye(V)[2][:, None] * np.ones(D))


def test_the_gradient_of_a_row_is_the_sum_over_its_tokens():
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, V - 1, (3, 50))  # the last row has no token
  incoming = rng.normal(size=(3, 50, D)).astype(np.float32)
  one_hot = np.eye(V)[tokens.ravel()]
  expected = one_hot.T @ incoming.reshape(-1, D).astype(np.float64)
  found = gradient(TABLE, tokens, incoming)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert not found[-1].any()


def test_many_small_terms_are_summed_in_float32():
  """In bfloat16 a sum of ones stops at 256."""
  tokens = np.zeros((1, 4096), np.int32)
  incoming = jnp.ones((1, 4096, D), jnp.bfloat16)
  found = gradient(TABLE, tokens, incoming, EmbedSpec('bfloat16'))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[0], 4096)


def test_an_inlet_takes_the_gradient_of_another_use():
  parts = (1, 1)
  rng = np.random.default_rng(2)
  tokens = jnp.asarray(rng.integers(0, V, (2, 9)))
  incoming = rng.normal(size=(2, 9, D)).astype(np.float32)
  other = rng.normal(size=(*parts, V, D)).astype(np.float32)

  def rows(table):
    return embed_with_inlet(table, tokens, EmbedSpec(), unsharded, parts)

  (found, inlet), pull = jax.vjp(rows, jnp.asarray(TABLE))
  np.testing.assert_array_equal(found, TABLE[np.asarray(tokens)])
  assert inlet.shape == other.shape
  total = pull((jnp.asarray(incoming), jnp.asarray(other)))[0]
  expected = gradient(TABLE, tokens, incoming) + other[0, 0]
  np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_loss_adds_its_gradient_through_the_inlet():
  rng = np.random.default_rng(3)
  tokens, targets = (jnp.asarray(rng.integers(0, V, (2, 9))) for _ in range(2))
  weights = jnp.asarray(rng.uniform(size=(2, 9)), jnp.float32)
  spec = LossSpec(chunk=4, vocab_first=True)

  def loss(table, tied):
    if tied:
      x, inlet = embed_with_inlet(table, tokens, EmbedSpec(), unsharded, (1, 1))
    else:
      x, inlet = embed(table, tokens), None
    arrays = jnp.sin(x), table, targets, weights
    return cross_entropy(*arrays, spec, inlet=inlet).total

  found, expected = (
    jax.value_and_grad(loss)(jnp.asarray(TABLE), tied) for tied in (True, False)
  )
  assert found[0] == expected[0]
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-7)
