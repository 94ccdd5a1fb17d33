"""The next token from its logits: the likeliest one, or a draw.

    p = softmax(logits / temperature), then the likeliest `top_k` tokens, of
    those the fewest that make up `top_p`, of those the ones with at least
    `min_p` times the largest p; what is left is drawn from as p says.

Names and order are those of Hugging Face's `generate`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen; the default takes the likeliest."""

  temperature: float = 0.0  # 0: greedy
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  min_p: float = 0.0
  # Ranges [begin, end) of ids that are never chosen, see `ids_without_token`.
  never: Ranges = ()

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
        f'temperature={self.temperature} must be a finite number, and not '
        'negative'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must not be negative')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1]')
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p={self.min_p} must lie in [0, 1]')


def ids_without_token(known: Bool[np.ndarray, ' _'], vocab: int) -> Ranges:
  """Ranges of ids that a model can give and its tokenizer does not know.

  Vocabularies are rounded up to sizes that devices divide, and may have gaps.

  Args:
    known: Which ids are tokens, for as many as the tokenizer has.
    vocab: Ids of the model.
  """
  missing = np.ones(vocab + 2, bool)
  missing[[0, -1]] = False  # so that every range has two ends
  count = min(len(known), vocab)
  missing[1 : count + 1] = ~known[:count]
  ends = np.flatnonzero(np.diff(missing)).tolist()
  return tuple(zip(ends[::2], ends[1::2], strict=True))


def filter_logits(
  logits: Float[Array, 'B V'], sampling: Sampling
) -> Float[Array, 'B V']:
  """Logits over temperature; -inf for the tokens that no draw may give.

  Tokens as likely as the last that a filter leaves are left with it.
  """
  logits = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
  vocab = logits.shape[-1]
  if 0 < sampling.top_k < vocab:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    p = jax.nn.softmax(ranked, axis=-1)
    # A token is in while those before it do not make up top_p, so that the
    # first one always is.
    inside = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.min_p > 0:
    top = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits < top + jnp.log(sampling.min_p), -jnp.inf, logits)
  return logits


def choose(
  logits: Float[Array, 'B V'],
  seed: Int[Array, ''],
  index: Int[Array, ''],
  sampling: Sampling,
) -> Int[Array, ' B']:
  """One token for each row.

  Args:
    logits: Logits of the next token.
    seed: One for the whole call.
    index: The number of this token among those generated; with the seed and
      the row's number it fixes the draw.
    sampling: Static.
  """
  ids = jnp.arange(logits.shape[-1])
  for begin, end in sampling.never:
    logits = jnp.where((ids >= begin) & (ids < end), -jnp.inf, logits)
  if not sampling.temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  key = jax.random.fold_in(jax.random.key(seed), index)
  rows = jnp.arange(logits.shape[0])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  draws = jax.vmap(jax.random.categorical)(
    keys, filter_logits(logits, sampling)
  )
  return draws.astype(jnp.int32)
