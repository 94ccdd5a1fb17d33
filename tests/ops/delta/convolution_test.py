"""ops/delta/convolution.py against sums that are written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta.convolution import convolve
from gated_jax.ops.delta.convolution import extend

WIDTH, LENGTH = 4, 9
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, LENGTH, 3, 5)).astype(np.float32)
FILTERS = RNG.normal(size=(WIDTH, 3, 5)).astype(np.float32)
HISTORY = RNG.normal(size=(2, WIDTH - 1, 3, 5)).astype(np.float32)


def sums(x):
  """Filtered x of one document, zeros before it."""
  y = np.zeros(x.shape)
  for t in range(len(x)):
    for back in range(min(WIDTH, t + 1)):
      y[t] += FILTERS[WIDTH - 1 - back] * x[t - back]
  return y


def test_the_last_weight_is_that_of_the_token_itself():
  expected = np.stack([sums(x) for x in X])
  np.testing.assert_allclose(convolve(X, FILTERS), expected, atol=1e-5)


def test_inputs_before_the_row_count_until_its_first_new_document():
  first = np.arange(LENGTH) == np.array([[4], [-1]])
  found = convolve(X, FILTERS, HISTORY, first)
  continued = [
    sums(np.concatenate([HISTORY[i], X[i]]))[WIDTH - 1 :] for i in (0, 1)
  ]
  np.testing.assert_allclose(found[0, :4], continued[0][:4], atol=1e-5)
  np.testing.assert_allclose(found[0, 4:], sums(X[0, 4:]), atol=1e-5)
  np.testing.assert_allclose(found[1], continued[1], atol=1e-5)


@pytest.mark.parametrize('cut', range(1, LENGTH))
def test_documents_do_not_meet_wherever_they_are_cut(cut):
  first = np.broadcast_to(np.arange(LENGTH) == cut, (2, LENGTH))
  found = convolve(X, FILTERS, None, first)
  for begin, end in ((0, cut), (cut, LENGTH)):
    expected = [sums(x[begin:end]) for x in X]
    np.testing.assert_allclose(found[:, begin:end], expected, atol=1e-5)


def test_the_history_ends_with_the_last_token_that_is_not_padding():
  lengths = np.array([1, 6])
  found = extend(jnp.asarray(HISTORY), X, np.arange(LENGTH) < lengths[:, None])
  for row, length in enumerate(lengths):
    inputs = np.concatenate([HISTORY[row], X[row, :length]])
    np.testing.assert_array_equal(found[row], inputs[-(WIDTH - 1) :])
  np.testing.assert_array_equal(extend(HISTORY, X), X[:, -(WIDTH - 1) :])
