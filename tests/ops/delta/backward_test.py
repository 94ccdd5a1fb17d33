"""The backward pass written by hand, in plain float64 arrays.

It has the formulas of `gated_jax/ops/delta/pallas_tpu/backward.py`, chunk after
chunk, and must give what JAX makes of the recurrence. The kernel's test then
compares with it, so that a wrong formula and a wrong kernel can be told apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs
from tests.ops.delta.rule_test import arrays
from tests.ops.delta.rule_test import states


class Chunk:
  """One value head's chunk: the forward pass, and the gradients."""

  def __init__(self, query, key, value, log_decay, beta, first, state):
    self.query, self.key, self.state = query, key, state
    self.value, self.beta, self.first = value, beta, first
    total, document = np.cumsum(log_decay), np.cumsum(first)
    related = document[:, None] == document[None]
    apart = total[:, None] - total[None]
    self.decay = np.tril(np.exp(np.where(related, apart, -np.inf)))
    self.entering = np.where(document == 0, np.exp(total), 0)[:, None]
    self.leaving = self.decay[-1][:, None]
    self.share = self.decay * beta
    self.coupling = np.tril(key @ key.T, -1) * self.share
    self.inverse = np.linalg.inv(np.eye(len(beta)) + self.coupling)
    self.errors = self.inverse @ (value - self.entering * (key @ state))
    self.writing = self.leaving * beta[:, None]
    self.last = self.entering[-1] * state
    self.last = self.last + key.T @ (self.writing * self.errors)

  def gradients(self, d_output, d_last):
    """Those of query, key, value, log_decay, beta, and of the state."""
    query, key, errors = self.query, self.key, self.errors
    weights = query @ key.T
    known = key @ d_last
    d_errors = (weights * self.share).T @ d_output + self.writing * known
    d_value = self.inverse.T @ d_errors
    y, z = self.entering * d_output, self.entering * d_value
    d_state = self.entering[-1] * d_last + query.T @ y - key.T @ z
    d_scores, d_coupling = d_output @ errors.T, -d_value @ errors.T
    d_query = y @ self.state.T + (d_scores * self.share) @ key
    pairs = np.tril(d_coupling * self.share, -1)
    d_key = (
      self.writing * errors @ d_last.T
      - z @ self.state.T
      + (d_scores * self.share).T @ query
      + (pairs + pairs.T) @ key
    )
    d_decay = d_scores * weights + d_coupling * np.tril(key @ key.T, -1)
    d_writing = np.sum(errors * known, axis=1)
    d_beta = np.sum(d_decay * self.decay, axis=0)
    d_beta += self.leaving[:, 0] * d_writing
    d_total = np.sum(d_decay * self.share, axis=1)
    d_total -= np.sum(d_decay * self.share, axis=0)
    d_total += np.sum(query * (y @ self.state.T), axis=1)
    d_total -= np.sum(key * (z @ self.state.T), axis=1)
    d_total -= self.writing[:, 0] * d_writing
    d_total[-1] += np.sum(d_last * self.last)
    # The first tokens of documents have no decay.
    d_log = np.where(self.first, 0, np.cumsum(d_total[::-1])[::-1])
    return (d_query, d_key, d_value, d_log, d_beta), d_state


def by_hand(inputs, state, first, slopes, chunk):
  """Gradients of inputs and state, given those of output and last state."""
  inputs = Inputs(*(np.asarray(x, np.float64) for x in inputs))
  first = np.asarray(first)
  d_output, d_last = (np.asarray(x, np.float64) for x in slopes)
  d_inputs = Inputs(*(np.zeros(x.shape) for x in inputs))
  d_state = np.zeros(state.shape)
  rows, length, heads = inputs.beta.shape
  for b, n in np.ndindex(rows, heads):
    k = n // inputs.repeats
    places = (k, k, n, n, n)
    parts = [slice(t, t + chunk) for t in range(0, length, chunk)]
    s, chunks = np.asarray(state[b, n], np.float64), []
    for at in parts:
      tokens = (x[b, at, i] for x, i in zip(inputs, places, strict=True))
      chunks.append(Chunk(*tokens, first[b, at], s))
      s = chunks[-1].last
    slope = d_last[b, n]
    for at, each in zip(parts[::-1], chunks[::-1], strict=True):
      found, slope = each.gradients(d_output[b, at, n], slope)
      for total, i, x in zip(d_inputs, places, found, strict=True):
        total[b, at, i] += x
    d_state[b, n] = slope
  return d_inputs, d_state


@pytest.mark.parametrize('decay', [0.05, 1.0, 40.0])
def test_gradients_by_hand_are_those_of_the_recurrence(decay):
  length = 20
  inputs, state = arrays(length, decay=decay), states()
  rng = np.random.default_rng(5)
  first = rng.uniform(size=inputs.beta.shape[:2]) < 0.15
  first[0], first[1, 8] = False, True
  slopes = rng.normal(size=inputs.value.shape), rng.normal(size=state.shape)
  found = by_hand(inputs, state, first, slopes, chunk=8)
  with jax.enable_x64(True):
    _, pull = jax.vjp(
      lambda x, s: rule.recurrence(x, s, jnp.asarray(first)),
      Inputs(*map(jnp.asarray, inputs)),
      jnp.asarray(state),
    )
    expected = jax.jit(pull)(tuple(map(jnp.asarray, slopes)))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert b.dtype == np.float64
    np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())
