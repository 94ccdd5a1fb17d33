"""The decode kernel against plain attention; the pages that it copies."""

import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.attention import decode_tpu
from gated_jax.ops.attention.decode_tpu import DecodeSpec

B, S, N, K, PAGE = 3, 64, 4, 2, 16


def plain(query, key, value, scores, lengths, skipped, window):
  """Loops in float64."""
  query, key, value, scores = (
    np.asarray(x, np.float64) for x in (query, key, value, scores)
  )
  width = query.shape[-1]
  output = np.zeros((B, N, value.shape[-1]))
  for b in range(B):
    low = max(0, lengths[b] - window) if window else 0
    for n in range(N):
      k = n // (N // K)
      if skipped[b, k]:
        continue
      seen = slice(low, lengths[b])
      logits = key[b, k, seen] @ query[b, n] / np.sqrt(width)
      p = np.exp(logits - logits.max())
      output[b, n] = p @ value[b, k, seen] / p.sum()
  return output * scores


@pytest.mark.parametrize(
  ('width', 'values', 'window', 'channels'),
  [(128, 128, 0, 128), (64, 64, 20, 1), (64, 32, 0, 32)],
)
def test_the_kernel_is_attention_without_the_skipped_heads(
  width, values, window, channels
):
  rng = np.random.default_rng(0)
  query, key, value, scores = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in (
      (B, N, width),
      (B, K, S, width),
      (B, K, S, values),
      (B, N, channels),
    )
  )
  lengths = np.array([1, 33, 64], np.int32)
  skipped = np.array([[0, 1], [0, 0], [1, 0]], bool)
  # Pages that nobody needs would show: they hold no numbers.
  first = np.arange(S) // PAGE * PAGE
  read = first < lengths[:, None]
  if window:
    read &= first + PAGE > lengths[:, None] - window
  read = (read[:, None] & ~skipped[..., None])[..., None]
  key, value = (jnp.where(read, x, jnp.nan) for x in (key, value))
  found = decode_tpu.attend(
    query,
    key,
    value,
    scores,
    jnp.asarray(lengths),
    jnp.asarray(skipped),
    DecodeSpec(PAGE, window, interpret=True),
  )
  expected = plain(query, key, value, scores, lengths, skipped, window)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_page_is_copied_once_and_only_if_it_is_needed():
  lengths, skipped = (
    jnp.array([33, 5]),
    jnp.array([[False, True], [True, False]]),
  )
  wanted, held = decode_tpu.page_table(lengths, skipped, 4, DecodeSpec(PAGE))
  needed = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
  np.testing.assert_array_equal(wanted, needed)
  np.testing.assert_array_equal(held[jnp.flatnonzero(wanted)], [0, 1, 2, 12])
  assert 1 + np.count_nonzero(np.diff(held)) == sum(needed)
  wanted, _ = decode_tpu.page_table(
    lengths, ~skipped | True, 4, DecodeSpec(PAGE)
  )
  assert not wanted.any()
  wanted, _ = decode_tpu.page_table(
    lengths, skipped & False, 4, DecodeSpec(PAGE, 10)
  )
  # Tokens 23 to 32 and 0 to 4.
  np.testing.assert_array_equal(
    wanted.reshape(2, 2, 4)[:, 0], [[0, 1, 1, 0], [1, 0, 0, 0]]
  )


@pytest.mark.parametrize(
  ('room', 'page'), [(32, 32), (320, 64), (1280, 256), (4096, 1024)]
)
def test_pages_divide_the_room(room, page):
  assert decode_tpu.page_of(room, DecodeSpec()) == page


def test_what_has_no_whole_pages_is_refused():
  x = jnp.zeros((1, 1, 40, 64))
  with pytest.raises(NotImplementedError, match='room for 40 tokens'):
    decode_tpu.attend(
      jnp.zeros((1, 1, 64)),
      x,
      x,
      jnp.ones((1, 1, 1)),
      jnp.ones(1, int),
      jnp.zeros((1, 1), bool),
    )
