"""Probes against what they stand for, counted with plain NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops import probes
from gated_jax.ops.attention import AttentionSpec
from gated_jax.ops.attention import Masking
from gated_jax.ops.attention import gated_dot_product_attention

SEGMENTS = np.array(
  [
    [1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0, 0],
    [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2],
  ]
)


def random(seed, *shape):
  values = np.random.default_rng(seed).normal(size=shape)
  return values.astype(np.float32)


def probabilities(query, key, segments, scale, window):
  """All attention weights [B, N, T, S] in float64, one at a time."""
  b, t, n, _ = query.shape
  group = n // key.shape[2]
  result = np.zeros((b, n, t, t))
  for row in range(b):
    for head in range(n):
      for i in range(t):
        seen = [
          j
          for j in range(i + 1)
          if segments[row, i] == segments[row, j]
          and (not window or i - j < window)
        ]
        logits = np.array(
          [
            scale
            * np.dot(
              query[row, i, head].astype(np.float64),
              key[row, j, head // group].astype(np.float64),
            )
            for j in seen
          ]
        )
        weights = np.exp(logits - logits.max())
        result[row, head, i, seen] = weights / weights.sum()
  return result


@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (4, 2), (6, 1)])
def test_first_token_attention_is_read_off_the_full_matrix(
  heads, kv_heads, packed, window
):
  segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
  b, t = segments.shape
  query = jnp.asarray(2 * random(0, b, t, heads, 8))
  key = jnp.asarray(random(1, b, t, kv_heads, 8))
  given = jnp.asarray(segments) if packed else None
  _, lse = gated_dot_product_attention(
    query,
    key,
    jnp.asarray(random(2, b, t, kv_heads, 8)),
    masking=Masking(given, given),
    spec=AttentionSpec(window=window, scale=0.7, return_lse=True),
    implementation='xla',
  )
  found = jax.jit(
    probes.first_token_attention, static_argnames=('scale', 'window')
  )(query, key, lse, given, scale=0.7, window=window)
  weights = probabilities(
    np.asarray(query), np.asarray(key), segments, 0.7, window
  )
  shown = probes.attention_weights(query, key, lse, given, 0.7, window)
  np.testing.assert_allclose(shown, weights, rtol=1e-5, atol=1e-7)
  total, count = np.zeros(heads), 0
  for row in range(b):
    first = 0
    for i in range(t):
      if i and segments[row, i] != segments[row, i - 1]:
        first = i
      if i != first and segments[row, i] != 0:
        total += weights[row, :, i, first]
        count += 1
  assert found.number == count
  np.testing.assert_allclose(found.total, total, rtol=1e-5)
  assert 0.05 < total.mean() / count < 0.95


@pytest.mark.parametrize('packed', [True, False])
def test_first_token_attention_within_is_that_of_documents_cut_short(packed):
  segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
  b, t = segments.shape
  query = jnp.asarray(2 * random(0, b, t, 4, 8))
  key = jnp.asarray(random(1, b, t, 2, 8))
  given = jnp.asarray(segments) if packed else None
  weights = probabilities(
    np.asarray(query), np.asarray(key), segments, 0.7, window=0
  )
  logits = np.einsum('btnh,bsnh->bnts', query, np.repeat(key, 2, 2)) * 0.7
  # Whatever a query sees, its log-sum-exp is a logit less its log-probability.
  own = np.arange(t)
  lse = logits[:, :, own, own] - np.log(weights[:, :, own, own])
  found = probes.first_token_attention(
    query, key, jnp.asarray(lse), given, 0.7, within=4
  )
  total, count = np.zeros(4), 0
  for row in range(b):
    first = 0
    for i in range(t):
      if i and segments[row, i] != segments[row, i - 1]:
        first = i
      if 0 < i - first < 4 and segments[row, i] != 0:
        total += weights[row, :, i, first]
        count += 1
  assert found.number == count
  np.testing.assert_allclose(found.total, total, rtol=1e-4)


@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('block', [4, 5, 128])
def test_the_largest_logit_is_that_of_the_full_matrix(
  block, packed, window, monkeypatch
):
  monkeypatch.setattr(probes, 'LOGIT_BLOCK', block)
  segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
  b, t = segments.shape
  query, key = random(0, b, t, 4, 8), random(1, b, t, 2, 8)
  # Larger ones lie where no query looks: the future, and other documents.
  query[0, 0, 0], key[0, 11, 0] = 9, 9
  largest = -np.inf
  for row in range(b):
    for i in range(t):
      for j in range(i + 1):
        seen = segments[row, i] == segments[row, j] != 0
        if seen and not (window and i - j >= window):
          logits = [
            0.7 * query[row, i, n] @ key[row, j, n // 2] for n in range(4)
          ]
          largest = max(largest, *logits)
  found = probes.largest_logit(
    jnp.asarray(query),
    jnp.asarray(key),
    jnp.asarray(segments) if packed else None,
    0.7,
    window,
  )
  np.testing.assert_allclose(found, largest, rtol=1e-5)


def test_without_queries_to_count_the_first_token_probe_is_zero_of_zero():
  query = jnp.asarray(random(0, 1, 4, 2, 8))
  lse = jnp.full((1, 2, 4), -jnp.inf)
  segments = jnp.zeros((1, 4), jnp.int32)
  found = probes.first_token_attention(query, query, lse, segments, scale=1.0)
  assert found.number == 0
  np.testing.assert_array_equal(found.total, np.zeros(2))


def test_document_starts_restart_where_the_number_changes():
  starts = probes.document_starts(jnp.array([[5, 5, 1, 1, 1, 5, 0, 0]]))
  np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 6, 6]])


@pytest.mark.parametrize('width', [1, 5])
def test_score_statistics_count_what_a_loop_counts(width):
  scores = np.random.default_rng(3).uniform(-0.3, 1.3, (2, 12, 3, width))
  scores = scores.astype(np.float32)
  scores[0, 0] = 1.0  # of the last bin
  scores[0, 1] = 0.0  # of the first
  valid = SEGMENTS != 0
  found = probes.score_statistics(jnp.asarray(scores), jnp.asarray(valid))
  kept = scores[valid]  # [tokens, N, H]
  assert found.number == kept.shape[0] * width
  np.testing.assert_allclose(found.total, kept.sum((0, 2)), rtol=1e-5)
  np.testing.assert_array_equal(found.below, (kept < 0.1).sum((0, 2)))
  for head in range(3):
    expected = [0] * 22
    for score in kept[:, head].ravel():
      if score < 0:
        expected[0] += 1
      elif score > 1:
        expected[21] += 1
      else:
        expected[1 + min(int(score * 20), 19)] += 1
    np.testing.assert_array_equal(found.histogram[head], expected)


def test_scores_without_tokens_count_once_for_every_token():
  valid = SEGMENTS != 0
  found = probes.score_statistics(
    jnp.full((1, 1, 2, 4), 0.5), jnp.asarray(valid)
  )
  np.testing.assert_allclose(found.total / found.number, [0.5, 0.5])
  assert found.number == valid.sum() * 4


def test_logit_norm_and_largest_activation_leave_padding_out():
  valid = SEGMENTS != 0
  x = random(4, 2, 12, 3, 4)
  x[~valid] = 1e6
  norm = probes.logit_norm(jnp.asarray(x), jnp.asarray(valid))
  expected = np.sqrt((x[valid].astype(np.float64) ** 2).sum(-1)).sum(0)
  np.testing.assert_allclose(norm.total, expected, rtol=1e-5)
  assert norm.number == valid.sum()
  flat = x.reshape(2, 12, 12)
  flat[1, 3, 5] = -77.0
  largest = probes.largest_activation(jnp.asarray(flat), jnp.asarray(valid))
  assert largest == 77.0


def test_sparsity_counts_small_entries_of_valid_tokens():
  y = np.full((2, 12, 2, 4), 5e-3, np.float32)
  y[0, 0] = 1.0
  y[0, 1] = -1e-4
  y[0, 11] = 0.0  # padding
  valid = SEGMENTS != 0
  found = probes.sparsity(jnp.asarray(y), jnp.asarray(valid))
  assert found.number == valid.sum() * 8
  np.testing.assert_array_equal(found.below, [(valid.sum() - 1) * 8, 8])
