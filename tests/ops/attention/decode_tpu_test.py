"""The decode kernel against plain attention; the pages that it copies."""

import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.attention import decode_tpu
from gated_jax.ops.attention.decode_tpu import DecodeSpec

B, S, N, K, H, PAGE = 3, 64, 4, 2, 128, 16


def plain(query, key, value, scores, lengths, quiet, window):
  """Loops in float64."""
  query, key, value, scores = (
    np.asarray(x, np.float64) for x in (query, key, value, scores)
  )
  output = np.zeros((B, N, H))
  for b in range(B):
    low = max(0, lengths[b] - window) if window else 0
    for n in range(N):
      k = n // (N // K)
      if quiet[b, k]:
        continue
      at = slice(k * H, (k + 1) * H)
      logits = key[b, low : lengths[b], at] @ query[b, n] / np.sqrt(H)
      p = np.exp(logits - logits.max())
      output[b, n] = p @ value[b, low : lengths[b], at] / p.sum()
  return output * scores


@pytest.mark.parametrize(('window', 'channels'), [(0, H), (20, 1)])
def test_the_kernel_is_attention_without_the_quiet_heads(window, channels):
  rng = np.random.default_rng(0)
  query, key, value, scores = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((B, N, H), (B, S, K * H), (B, S, K * H), (B, N, channels))
  )
  lengths = np.array([1, 33, 64], np.int32)
  quiet = np.array([[0, 1], [0, 0], [1, 0]], bool)
  # Pages that nobody needs would show: they hold no numbers.
  first = np.arange(S) // PAGE * PAGE
  read = first < lengths[:, None]
  if window:
    read &= first + PAGE > lengths[:, None] - window
  read = np.repeat(read[..., None] & ~quiet[:, None], H, axis=2)
  key, value = (jnp.where(read, x, jnp.nan) for x in (key, value))
  found = decode_tpu.attend(
    query,
    key,
    value,
    scores,
    jnp.asarray(lengths),
    jnp.asarray(quiet),
    DecodeSpec(PAGE, window, interpret=True),
  )
  expected = plain(query, key, value, scores, lengths, quiet, window)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_page_is_copied_once_and_only_if_it_is_needed():
  lengths, quiet = jnp.array([33, 5]), jnp.array([[False, True], [True, False]])
  wanted, held = decode_tpu.page_table(lengths, quiet, 4, DecodeSpec(PAGE))
  needed = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
  np.testing.assert_array_equal(wanted, needed)
  np.testing.assert_array_equal(held[jnp.flatnonzero(wanted)], [0, 1, 2, 12])
  assert 1 + np.count_nonzero(np.diff(held)) == sum(needed)
  wanted, _ = decode_tpu.page_table(lengths, ~quiet | True, 4, DecodeSpec(PAGE))
  assert not wanted.any()
  wanted, _ = decode_tpu.page_table(
    lengths, quiet & False, 4, DecodeSpec(PAGE, 10)
  )
  # Tokens 23 to 32 and 0 to 4.
  np.testing.assert_array_equal(
    wanted.reshape(2, 2, 4)[:, 0], [[0, 1, 1, 0], [1, 0, 0, 0]]
  )


def test_what_has_no_whole_tiles_is_refused():
  x = jnp.zeros((1, 16, 64))
  with pytest.raises(NotImplementedError, match='head width of 64'):
    decode_tpu.attend(
      jnp.zeros((1, 1, 64)),
      x,
      x,
      jnp.ones((1, 1, 1)),
      jnp.ones(1, int),
      jnp.zeros((1, 1), bool),
      DecodeSpec(16),
    )
