"""One query to a cache of keys, with heads that need not be read.

    y = s * (p V)        |y| <= s * max|V|        s = the gate's score

The gate of a token is known before its attention: softmax weights sum to one,
so where all scores of the query heads that share a kv head are below a
threshold, leaving that head out changes no channel by more than the threshold
times the largest |value|. `quiet_heads` finds those heads. A TPU then reads the
rest of the cache alone (`decode_tpu.py`); elsewhere `leave_out` drops them.
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.attention import api
from gated_jax.ops.attention import decode_tpu


def quiet_heads(
  scores: Float[Array, 'B T N #H'],
  kv_heads: int,
  threshold: Float[Array, ''],
) -> Bool[Array, 'B T K']:
  """Kv heads that no query head of a token listens to.

  Args:
    scores: of the gate, after its activation.
    kv_heads: K; N / K query heads read each of them.
    threshold: |scores| below it are as good as none; 0: none are.
  """
  loudest = jnp.max(jnp.abs(scores), axis=-1)
  b, t, n = loudest.shape
  groups = loudest.reshape(b, t, kv_heads, n // kv_heads)
  return jnp.max(groups, axis=-1) < threshold


def leave_out(
  output: Float[Array, 'B T N H'], quiet: Bool[Array, 'B T K']
) -> Float[Array, 'B T N H']:
  """Gated output with zeros for the heads that read a quiet kv head."""
  per_head = jnp.repeat(quiet, output.shape[2] // quiet.shape[2], axis=2)
  return jnp.where(per_head[..., None], 0, output)


def error_bound(
  value: Float[Array, 'B S K H'], threshold: Float[Array, '']
) -> Float[Array, ' K']:
  """The most that leaving a head out changes a channel of gated output."""
  return threshold * jnp.max(jnp.abs(value), axis=(0, 1, 3))


def reads_pages(queries: int, width: int, implementation: str) -> bool:
  """Whether a call goes to the TPU kernel.

  Args:
    queries: of each row; the kernel takes one.
    width: of a head.
    implementation: as in `api.py`. Automatic choice takes the kernel only for
      heads that fill a TPU's lanes: narrower ones lie there with tokens
      innermost, and the whole cache would be copied to transpose them.
  """
  has_kernel = api.first_choice(implementation).read_pages is not None
  chosen = implementation != 'auto' or width % decode_tpu.LANES == 0
  return has_kernel and chosen and queries == 1


def read_pages(
  query: Float[Array, 'B N H'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S H'],
  scores: Float[Array, 'B N #H'],
  lengths: Int[Array, ' B'],
  quiet: Bool[Array, 'B K'],
  window: int,
) -> Float[Array, 'B N H']:
  """Gated attention of one token of each row, as `decode_tpu.attend`."""
  spec = decode_tpu.DecodeSpec(window=window)
  return decode_tpu.attend(query, key, value, scores, lengths, quiet, spec)
