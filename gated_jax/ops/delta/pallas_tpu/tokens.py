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

ROWS = ('steps', 'rest', 'beta', 'entering', 'leaving')
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
  known: dict[str, Array] = {
    'steps': steps - APART * document,
    'rest': rest,
    'beta': in_chunks(inputs.beta.astype(jnp.float32)),
    'entering': entering,
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
