"""Numbers for a curious reader of a layer, from arrays that it has anyway.

    p(t, first) = exp(scale * q_t . k_first - lse_t)

Each function returns sums and counts rather than means, so that batches,
devices and steps add up to the right average: divide only at the end.
`gated_jax/evals/diagnostics.py` does, and says what the figures mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.attention.masks import visible_keys
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking

# Scores are counted below zero, in twenty bins from 0 to 1, and above one.
# One itself lies in the last of the twenty: a shut or open sigmoid rounds.
EDGES = np.linspace(0.0, 1.0, 21)
BINS = len(EDGES) + 1
# Entries of attention's output smaller than these count as nothing (Fig. 5).
SMALL = (1e-2, 1e-3)
# Tokens of a document within which sinks are looked for a second time: the
# share of sink heads in the literature is stated for texts this short.
NEAR = 64
# Queries whose attention logits are held at once.
LOGIT_BLOCK = 128


class HeadTotals(NamedTuple):
  """A sum for each head, and the number of terms in each sum."""

  total: Float[Array, '*layers N']
  number: Float[Array, '*layers']


class ScoreStatistics(NamedTuple):
  """Sums over the gate scores of each head, valid tokens only."""

  total: Float[Array, '*layers N']
  below: Int[Array, '*layers N']  # scores under 0.1
  histogram: Int[Array, '*layers N bins']  # see EDGES
  number: Float[Array, '*layers']  # scores of each head


class Sparsity(NamedTuple):
  """How many entries are nearly zero: one number per entry of SMALL."""

  below: Float[Array, '*layers small']
  number: Float[Array, '*layers']


def document_starts(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Index of the first token of the run of equal numbers around each token."""
  changes = segments[:, 1:] != segments[:, :-1]
  index = jnp.arange(1, segments.shape[1])
  starts = jnp.where(changes, index, 0)
  starts = jnp.pad(starts, ((0, 0), (1, 0)))
  return jax.lax.cummax(starts, axis=1)


def first_token_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  lse: Float[Array, 'B N T'],
  segments: Int[Array, 'B T'] | None,
  scale: float,
  window: int = 0,
  within: int = 0,
) -> HeadTotals:
  """Attention that queries pay to their document's first token, exactly.

  The paper's F-Attn, without its attention matrix: O(B T N H) on every
  backend that returns the log-sum-exp. Documents are runs of equal segment
  numbers; number 0 is padding and does not count. Neither do the first tokens
  themselves, which have nothing else to look at.

  Args:
    query: as given to attention (normalised and rotated).
    key: likewise; the same positions as the queries.
    lse: attention's log-sum-exp.
    segments: document numbers; None: each row is one document.
    scale: attention's, between q.k and a logit (AttentionSpec.logit_scale).
    window: attention's window: farther queries do not see the first token
      and count with zero.
    within: only queries among this many first tokens of their document count;
      0: all. Attention is causal, so this is what the probe would give on
      documents cut to that length.

  Returns:
    Sum over the counted queries for each query head, and their number.
  """
  b, t, n, h = query.shape
  k = key.shape[2]
  position = jnp.arange(t)
  if segments is None:
    distance = jnp.broadcast_to(position, (b, t))
    first = key[:, :1]
    counted = distance > 0
  else:
    starts = document_starts(segments)
    distance = position - starts
    first = jnp.take_along_axis(key, starts[:, :, None, None], axis=1)
    counted = (distance > 0) & (segments != 0)
  if within:
    counted &= distance < within
  attention_logits = scale * jnp.einsum(
    'BTKGH,BTKH->BKGT',
    query.reshape(b, t, k, n // k, h),
    jnp.broadcast_to(first, (b, t, k, h)),
    preferred_element_type=jnp.float32,
  ).reshape(b, n, t)
  seen = counted & (distance < window) if window else counted
  # A query that sees nothing has lse = -inf: keep exp away from it.
  seen = seen[:, None] & jnp.isfinite(lse)
  share = jnp.exp(jnp.where(seen, attention_logits - lse, -jnp.inf))
  return HeadTotals(
    jnp.sum(share, axis=(0, 2)), jnp.sum(counted, dtype=jnp.float32)
  )


def largest_logit(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'] | None,
  scale: float,
  window: int = 0,
) -> Float[Array, '']:
  """Largest attention logit between any query and a key that it sees.

  Its growth precedes divergence at large learning rates (arXiv 2309.14322).
  Queries are worked through in blocks, so that no T x T matrix is held.
  Arguments are those of `first_token_attention`; padding does not count.
  """
  b, t, n, h = query.shape
  k = key.shape[2]
  blocks = -(-t // LOGIT_BLOCK)
  if segments is None:
    segments = jnp.ones((b, t), jnp.int32)
  padding = blocks * LOGIT_BLOCK - t

  def in_blocks(x: Array) -> Array:
    """Positions in blocks, [blocks, B, block, ...]."""
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(b, blocks, LOGIT_BLOCK, *x.shape[2:]), 1, 0)

  keys = jnp.arange(t)

  def largest(block: tuple[Array, Array, Array]) -> Array:
    """The largest logit of each head in one block of queries."""
    queries, numbers, positions = block
    logits = scale * jnp.einsum(
      'BTKGH,BSKH->BKGTS',
      queries.reshape(b, LOGIT_BLOCK, k, n // k, h),
      key,
      preferred_element_type=jnp.float32,
    )
    back = positions[:, None] - keys
    seen = (numbers[:, :, None] == segments[:, None]) & (back >= 0)
    seen &= (numbers != 0)[:, :, None]
    if window:
      seen &= back < window
    return jnp.max(jnp.where(seen[:, None, None], logits, -jnp.inf))

  positions = jnp.arange(blocks * LOGIT_BLOCK).reshape(blocks, LOGIT_BLOCK)
  parts = (in_blocks(query), in_blocks(segments), positions)
  return jnp.max(jax.lax.map(largest, parts))


def attention_weights(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  lse: Float[Array, 'B N T'],
  segments: Int[Array, 'B T'] | None,
  scale: float,
  window: int = 0,
) -> Float[Array, 'B N T T']:
  """All of causal self-attention's weights, for figures of short rows.

  Arguments are those of `first_token_attention`.
  """
  b, t, n, h = query.shape
  k = key.shape[2]
  attention_logits = scale * jnp.einsum(
    'BTKGH,BSKH->BKGTS',
    query.reshape(b, t, k, n // k, h),
    key,
    preferred_element_type=jnp.float32,
  ).reshape(b, n, t, t)
  masking = Masking(segments, segments)
  visible = visible_keys(t, t, masking, AttentionSpec(window=window))
  assert visible is not None
  shares = attention_logits - lse[..., None]
  return jnp.exp(jnp.where(visible, shares, -jnp.inf))


def score_statistics(
  scores: Float[Array, '#B #T N H'], valid: Bool[Array, 'B T']
) -> ScoreStatistics:
  """Mean, share below 0.1 and histogram of scores, as sums over valid tokens.

  Args:
    scores: after the activation; H is 1 for headwise ones. Scores that do not
      depend on the token may have B = T = 1.
    valid: tokens that count.
  """
  scores = scores.astype(jnp.float32)
  scores = jnp.broadcast_to(scores, (*valid.shape, *scores.shape[2:]))
  counts = valid[:, :, None, None]

  def number(rule: Array) -> Array:
    """How many of the counted positions follow the rule, by head."""
    return jnp.sum(rule & counts, axis=(0, 1, 3), dtype=jnp.int32)

  # How many lie left of each edge; the last edge belongs to its left.
  left = [number(scores < edge) for edge in EDGES[:-1]]
  left.append(number(scores <= EDGES[-1]))
  left.append(number(jnp.ones_like(scores, bool)))
  cumulative = jnp.stack(left, axis=-1)
  return ScoreStatistics(
    total=jnp.sum(jnp.where(counts, scores, 0.0), axis=(0, 1, 3)),
    below=number(scores < 0.1),
    histogram=jnp.diff(cumulative, axis=-1, prepend=0),
    number=jnp.sum(valid, dtype=jnp.float32) * scores.shape[-1],
  )


def logit_norm(
  gate_logits: Float[Array, '#B #T N H'], valid: Bool[Array, 'B T']
) -> HeadTotals:
  """Length of each head's vector of gate logits, summed over valid tokens."""
  norms = jnp.linalg.norm(gate_logits.astype(jnp.float32), axis=-1)
  norms = jnp.where(valid[:, :, None], norms, 0.0)
  return HeadTotals(
    jnp.sum(norms, axis=(0, 1)), jnp.sum(valid, dtype=jnp.float32)
  )


def largest_activation(
  x: Float[Array, 'B T D'], valid: Bool[Array, 'B T']
) -> Float[Array, '']:
  """Largest |x| over valid tokens (M-Act of one layer and batch)."""
  size = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32)
  return jnp.max(jnp.where(valid, size, 0.0))


def sparsity(y: Float[Array, 'B T N H'], valid: Bool[Array, 'B T']) -> Sparsity:
  """Entries of y smaller than each of SMALL, over valid tokens."""
  size = jnp.abs(y.astype(jnp.float32))
  counts = valid[:, :, None, None]
  below = [
    jnp.sum((size < small) & counts, dtype=jnp.float32) for small in SMALL
  ]
  entries = jnp.sum(valid, dtype=jnp.float32) * y.shape[2] * y.shape[3]
  return Sparsity(jnp.stack(below), entries)
