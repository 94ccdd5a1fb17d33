"""One query to a cache of keys, with heads that need not be read.

    y = s * (p V)        |y| <= s * max|V|        s = the gate's score

The gate of a token is known before its attention: softmax weights sum to one,
so where all scores of the query heads that share a kv head are below a
threshold, skipping that head changes no channel by more than the threshold
times the largest |value|. `skipped_heads` finds those heads. A TPU then reads
the rest of the cache alone (`decode_tpu.py`); elsewhere `zero_skipped` drops
their output.
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.chips import LANES
from gated_jax.ops.attention import api
from gated_jax.ops.attention import decode_tpu


def skipped_heads(
  scores: Float[Array, 'B T N #V'],
  kv_heads: int,
  threshold: Float[Array, ''],
) -> Bool[Array, 'B T K']:
  """Kv heads that every query head of a token shuts out.

  Args:
    scores: the gate's, after its activation.
    kv_heads: K; N / K query heads read each of them.
    threshold: |scores| below it count as shut; 0: none do.
  """
  loudest = jnp.max(jnp.abs(scores), axis=-1)
  b, t, n = loudest.shape
  groups = loudest.reshape(b, t, kv_heads, n // kv_heads)
  return jnp.max(groups, axis=-1) < threshold


def zero_skipped(
  output: Float[Array, 'B T N V'], skipped: Bool[Array, 'B T K']
) -> Float[Array, 'B T N V']:
  """Gated output with zeros for the query heads of a skipped kv head."""
  copies = output.shape[2] // skipped.shape[2]
  per_head = jnp.repeat(skipped, copies, axis=2)
  return jnp.where(per_head[..., None], 0, output)


def error_bound(
  value: Float[Array, 'B S K V'], threshold: Float[Array, '']
) -> Float[Array, ' K']:
  """The most that skipping a head changes a channel of gated output."""
  return threshold * jnp.max(jnp.abs(value), axis=(0, 1, 3))


def reads_pages(queries: int, head_dim: int, implementation: str) -> bool:
  """True for calls that go to a kernel which reads pages.

  Args:
    queries: queries of each row; the kernel takes one.
    head_dim: width of a head.
    implementation: as in `api.py`. Automatic choice takes the kernel only for
      heads that fill a TPU's lanes: narrower ones lie there with tokens
      innermost, and the whole cache would be copied to transpose them.
  """
  has_kernel = api.first_choice(implementation).read_pages is not None
  chosen = implementation != 'auto' or head_dim % LANES == 0
  return has_kernel and chosen and queries == 1


def read_pages(
  query: Float[Array, 'B N H'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S V'],
  scores: Float[Array, 'B N #V'],
  cache_length: Int[Array, ' B'],
  skipped: Bool[Array, 'B K'],
  window: int,
) -> Float[Array, 'B N V']:
  """Gated attention of one token of each row, as `decode_tpu.attend`."""
  spec = decode_tpu.DecodeSpec(window=window)
  return decode_tpu.attend(
    query, key, value, scores, cache_length, skipped, spec
  )
