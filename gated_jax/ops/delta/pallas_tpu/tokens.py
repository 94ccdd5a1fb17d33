"""Numbers that each token and head brings, as the kernels read them.

They come twice: as rows, whose lanes are tokens, and as columns, whose lanes
are the numbers. A kernel spreads a column over lanes and a row over sublanes,
and has to turn neither.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.delta.chunks import running_sum
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES

ROWS = ('steps', 'rest', 'beta', 'entering', 'writing', 'leaving')
# Sums of decays fall by this from document to document: exp(-128) is 0 in
# float32, and the sums stay exact.
APART = 128.0


def rows_of(
  inputs: Inputs, first: Bool[Array, 'B T']
) -> Float[Array, 'B N R T']:
  """One number for each token and head, in the order of `ROWS`."""
  batch, length, heads = inputs.beta.shape

  def in_chunks(x: Array) -> Array:
    """[B, T, n] as [B, n, chunks, tokens]."""
    x = x.reshape(batch, -1, CHUNK, x.shape[2])
    return jnp.moveaxis(x, 3, 1)

  steps, rest = running_sum(in_chunks(inputs.log_decay.astype(jnp.float32)))
  document = jnp.cumsum(in_chunks(first[..., None]), axis=3)
  document = jnp.broadcast_to(document, steps.shape)
  entering = jnp.where(document == 0, jnp.exp(steps + rest), 0)
  at_end = (steps[..., -1:] - steps) + (rest[..., -1:] - rest)
  leaving = jnp.where(document == document[..., -1:], jnp.exp(at_end), 0)
  beta = in_chunks(inputs.beta.astype(jnp.float32))
  known: dict[str, Array] = {
    'steps': steps - APART * document,
    'rest': rest,
    'beta': beta,
    'entering': entering,
    'writing': leaving * beta,
    'leaving': leaving,
  }
  rows = [known[name].reshape(batch, heads, length) for name in ROWS]
  rows += [jnp.zeros_like(rows[0])] * (SUBLANES - len(rows))
  return jnp.stack(rows, axis=2)


class PerToken(NamedTuple):
  """A head's numbers of each token, as rows and as columns."""

  rows: Float[Array, 'R C']
  columns: Float[Array, 'C R']

  def row(self, name: str) -> Float[Array, '1 C']:
    """Numbers along the lanes."""
    at = ROWS.index(name)
    return self.rows[at : at + 1]

  def column(self, name: str) -> Float[Array, 'C 1']:
    """Numbers along the sublanes."""
    at = ROWS.index(name)
    return self.columns[:, at : at + 1]


def decay_of(tokens: PerToken) -> Float[Array, 'C C']:
  """Decay from each token (lanes) to those after it in its document."""
  row, column = tokens.row, tokens.column
  total = column('steps') - row('steps')
  total += column('rest') - row('rest')
  here, there = (
    jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1)
  )
  # The exponential may overflow where a token comes before the other.
  return jnp.where(here >= there, jnp.exp(total), 0)


def gradients_of(
  rows: Float[Array, 'B N R T'],
  d_rows: Float[Array, 'B N R T'],
  d_columns: Float[Array, 'B G T R'],
  first: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T N'], Float[Array, 'B T N']]:
  """Gradients of the logarithms of decays, and of beta.

  Args:
    rows: those of `rows_of`.
    d_rows: what the kernel of the backward pass writes as rows: sums over
      later tokens, and of the state's gradient times the state.
    d_columns: what it writes as columns: sums over earlier tokens, and the
      gradient of 'writing'.
    first: True at the first token of a document.
  """
  batch, heads, _, length = rows.shape

  def in_chunks(x: Array) -> Array:
    """[B, N, T] as [B, N, chunks, tokens]."""
    return x.reshape(batch, heads, -1, CHUNK)

  beta, entering, writing, leaving = (
    in_chunks(rows[:, :, ROWS.index(name)])
    for name in ('beta', 'entering', 'writing', 'leaving')
  )
  columns = jnp.swapaxes(d_columns, 2, 3).reshape(rows.shape)
  pairs, kept = (in_chunks(d_rows[:, :, i]) for i in range(2))
  total, d_writing = (in_chunks(columns[:, :, i]) for i in range(2))
  d_beta = pairs + leaving * d_writing
  given = writing * d_writing
  d_total = total - beta * pairs - given
  d_last = entering[..., -1] * jnp.sum(kept, axis=3) + jnp.sum(given, axis=3)
  d_total = d_total.at[..., -1].add(d_last)
  # Each decay counts in the sums of its own and later tokens, in its document
  # alone: there must be no rounding of another's. A first token has none.
  first = first.reshape(batch, 1, -1, CHUNK)
  document = jnp.cumsum(first, axis=3)
  related = document[..., :, None] == document[..., None, :]
  later = jnp.triu(jnp.ones((CHUNK, CHUNK), bool)) & related
  later &= ~first[..., None]
  d_decay = jnp.einsum(
    'bncs,bcts->bnct',
    d_total,
    later[:, 0].astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  d_decay, d_beta = (
    jnp.moveaxis(x.reshape(batch, heads, length), 1, 2)
    for x in (d_decay, d_beta)
  )
  return d_decay, d_beta
