"""The gated delta rule for whole chunks of tokens, by products of matrices.

Within a chunk let G be the running sum of g, and D_ij = exp(G_i - G_j) the
decay from token j to a later token i of the same document. The corrections u
that a chunk's tokens write depend on each other:

    (I + A) u = beta (v - exp(G) S^T k)
    A_ij = beta_i (k_i . k_j) D_ij          j < i

so with T = (I + A)^-1 a chunk reads and updates the state it starts from by

    u  = T (beta v) - T (beta exp(G) k) S
    o  = exp(G) q S + ((q k^T) D) u         j <= i
    S <- exp(G_last) S + (exp(G_last - G) k)^T u

Everything but the three products with S is computed for all chunks at once. The
form is that of arXiv 2412.06464, section 3.3.

Documents: D is zero between tokens of different documents, and exp(G) and
exp(G_last) are zero where a document's first token stands between. Those are
zeros by choice, not by a large decay, so that nothing leaks.

The inverse: an entry of T is beta_i k_i^T P k_j, P being a product of the maps
I - beta k k^T that tokens apply to the state. Those are contractions while beta
is at most two, so that no entry exceeds the largest beta, or one, nor does any
of a block's, and T can be formed by products (`inverse.py`) where a general
system would have to be solved row by row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.inputs import State
from gated_jax.ops.delta.inverse import unit_lower_inverse

CHUNK = 64  # tokens


def by_chunks(
  inputs: Inputs,
  state: State,
  first: Bool[Array, 'B T'] | None = None,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T N V'], State]:
  """Computes what each token reads, and the state after the last one.

  Args:
    inputs: of all tokens.
    state: before the first token.
    first: True at the first token of a document; None: nowhere.
    chunk: tokens in one, a power of two; a shorter row takes a smaller one.
  """
  length = inputs.query.shape[1]
  chunk = min(chunk, 1 << (length - 1).bit_length())
  if first is None:
    first = jnp.zeros(inputs.query.shape[:2], bool)
  # Padding has beta = 0 and g = 0.
  pad = -length % chunk
  inputs = Inputs(*(pad_tokens(x, pad) for x in inputs))
  products = _Products(inputs, state.dtype)
  parts = _within(inputs, pad_tokens(first, pad), chunk, products)
  state, output = jax.lax.scan(products.across, state, parts)
  # [chunks, B, N, C, V] to [B, T, N, V].
  output = jnp.moveaxis(output, (0, 3), (1, 2))
  output = output.reshape(output.shape[0], -1, *output.shape[3:])
  return output[:, :length], state


def pad_tokens(x: Array, pad: int) -> Array:
  """x with `pad` zeros after its tokens."""
  if not pad:
    return x
  return jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))


def _split(x: Float[Array, 'B T N ...'], chunk: int) -> Array:
  """[B, T, N, ...] as [chunks, B, N, C, ...]."""
  x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
  return jnp.moveaxis(x, (1, 3), (0, 2))


class _Products:
  """Products of matrices, as precise as the arrays that go in."""

  def __init__(self, inputs: Inputs, wide: jnp.dtype):
    self.wide = wide
    narrow = inputs.value.dtype.itemsize < 4
    # Rounding to bfloat16 is what a TPU's default does to float32, and no loss
    # where the arrays come in bfloat16.
    kinds = jax.lax.Precision
    self.precision = kinds.DEFAULT if narrow else kinds.HIGHEST

  def __call__(self, equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, precision=self.precision)

  def across(
    self, state: State, parts: tuple[Array, ...]
  ) -> tuple[State, Float[Array, 'B N C V']]:
    """One chunk: what its tokens read, and the state that they leave."""
    read, weights, written, erased, key, keep = parts
    written -= self('BNCH,BNHV->BNCV', erased, state)
    output = self('BNCH,BNHV->BNCV', read, state)
    output += self('BNCS,BNSV->BNCV', weights, written)
    state = keep[..., None, None] * state
    return state + self('BNCH,BNCV->BNHV', key, written), output


def running_sum(x: Float[Array, '... C']) -> tuple[Array, Array]:
  """The running sum of x, in two parts to be added after any difference.

  After tokens that forget everything, sums are large, and the difference of two
  that are nearly equal is all rounding. So steps of 1/256 are summed apart,
  which is exact, and what remains of x is small.
  """
  steps = jax.lax.stop_gradient(jnp.round(x * 256) / 256)
  return jnp.cumsum(steps, axis=-1), jnp.cumsum(x - steps, axis=-1)


def _within(
  inputs: Inputs, first: Bool[Array, 'B T'], chunk: int, product: _Products
) -> tuple[Array, ...]:
  """Computes what chunks bring to the state, from their own tokens alone.

  Returns:
    Queries as they read the state, weights of the tokens' own corrections,
    those corrections to a state of zeros, what a state takes off them, keys as
    they write, and how much of the state is left after the chunk; all with
    axes [chunks, B, N, ...].
  """
  wide = product.wide
  query, key, value, log_decay, beta = (
    _split(x.astype(wide), chunk) for x in inputs
  )
  document = jnp.cumsum(_split(first[..., None], chunk), axis=3)
  total = running_sum(log_decay)
  before = jnp.tril(jnp.ones((chunk, chunk), bool))
  related = document[..., :, None] == document[..., None, :]
  # The mask comes before the exponential, which overflows where j is later.
  decay = sum(x[..., :, None] - x[..., None, :] for x in total)
  decay = jnp.exp(jnp.where(related & before, decay, -jnp.inf))
  # Decay from the state to each token, and from each token to the state.
  entering = jnp.where(document == 0, jnp.exp(sum(total)), 0)
  at_end = sum(x[..., -1:] - x for x in total)
  leaving = jnp.where(document == document[..., -1:], jnp.exp(at_end), 0)

  def repeat(x: Array) -> Array:
    return jnp.repeat(x, inputs.repeats, axis=2)

  # The inverse amplifies rounding: these products are always precise.
  similar = jnp.einsum(
    'cBKCH,cBKSH->cBKCS', key, key, precision=jax.lax.Precision.HIGHEST
  )
  coupling = repeat(similar) * decay * beta[..., None]
  inverse = unit_lower_inverse(jnp.tril(coupling, -1)) * beta[..., None, :]
  weights = repeat(product('cBKCH,cBKSH->cBKCS', query, key)) * decay
  key = repeat(key)
  return (
    repeat(query) * entering[..., None],
    weights,
    product('cBNCS,cBNSV->cBNCV', inverse, value),
    product('cBNCS,cBNSH->cBNCH', inverse, key * entering[..., None]),
    key * leaving[..., None],
    entering[..., -1],
  )
