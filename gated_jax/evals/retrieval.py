"""Does the model find one number in a long text? (The pass key task.)

    filler .. The pass key is 48213. Remember it. .. filler ..
    What is the pass key? The pass key is 48213

Teacher-forced: a row counts as found when every token of the answer is the
likeliest one given the text before it. One table of lengths and depths tells
where a model's context ends.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

FILLER = (
  'The grass is green. The sky is blue. The sun is yellow. '
  'Here we go. There and back again. '
)
NEEDLE = 'The pass key is {}. Remember it. '
QUESTION = 'What is the pass key? The pass key is'

Encode = Callable[[str], Sequence[int]]


class Texts(NamedTuple):
  """Rows of tokens, the last of which are the answer."""

  tokens: Int[np.ndarray, 'B T+1']
  answers: Int[np.ndarray, ' B']  # how many tokens each row's answer has


@dataclasses.dataclass(frozen=True)
class Recall:
  """Results by length (rows) and by depth of the needle (columns)."""

  lengths: tuple[int, ...]
  depths: tuple[float, ...]
  accuracy: np.ndarray  # share of rows whose whole answer was right
  nats: np.ndarray  # per token of the answer

  def scalars(self) -> dict[str, float]:
    """Accuracy by length, for logs."""
    return {
      f'retrieval/{length}': float(row.mean())
      for length, row in zip(self.lengths, self.accuracy, strict=True)
    }


def passkey(
  model: nn.Module,
  params: Any,
  encode: Encode,
  lengths: Sequence[int],
  depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
  rows: int = 8,
  seed: int = 0,
) -> Recall:
  """Hides `rows` numbers at each depth of texts of each length.

  Args:
    model: gives logits [B, T, V] of tokens [B, T], as `Decoder` does.
    params: its parameters.
    encode: text to token ids, without marks for beginning and end.
    lengths: in tokens.
    depths: 0 at the beginning of the text, 1 just before the question.
    rows: of one batch.
    seed: of the numbers.
  """
  shape = (len(lengths), len(depths))
  accuracy, nats = np.zeros(shape), np.zeros(shape)
  for i, length in enumerate(lengths):
    for j, depth in enumerate(depths):
      rng = np.random.default_rng((seed, i, j))
      texts = hide(encode, length, depth, rows, rng)
      last = int(texts.answers.max())
      right, cost = _read(model, last, params, texts)
      accuracy[i, j] = np.asarray(right).mean()
      nats[i, j] = float(cost)
  return Recall(tuple(lengths), tuple(depths), accuracy, nats)


def hide(
  encode: Encode,
  length: int,
  depth: float,
  rows: int,
  rng: np.random.Generator,
) -> Texts:
  """Rows that end in the question and its answer.

  A model reads `length` tokens of a row: all but the answer's last.

  Raises:
    ValueError: the length has no room for needle and question.
  """
  question = list(encode(QUESTION))
  filler = list(encode(FILLER))
  tokens = np.zeros((rows, length + 1), np.int32)
  answers = np.zeros(rows, np.int32)
  for row in range(rows):
    key = int(rng.integers(10_000, 100_000))
    needle, answer = list(encode(NEEDLE.format(key))), list(encode(f' {key}'))
    room = length + 1 - len(needle) - len(question) - len(answer)
    if room < 0:
      raise ValueError(
        f'{length=} is too short for needle, question and answer: they take '
        f'{length - room} tokens'
      )
    text = (filler * math.ceil(room / len(filler) + 1))[:room]
    # Between sentences, as near to the depth as they allow.
    cut = round(depth * room / len(filler)) * len(filler)
    cut = min(cut, room)
    tokens[row] = text[:cut] + needle + text[cut:] + question + answer
    answers[row] = len(answer)
  return Texts(tokens, answers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
  model: nn.Module, last: int, params: Any, texts: Any
) -> tuple[Bool[Array, ' B'], Float[Array, '']]:
  """Tells which rows have the right answer; nats per token of the answers."""
  # Compilers for accelerators move the cut before the product: logits of a
  # long text would not fit.
  logits: Any = model.apply({'params': params}, texts.tokens[:, :-1])
  logits = logits[:, -last:].astype(jnp.float32)
  targets = texts.tokens[:, -last:]
  asked = jnp.arange(last) >= last - texts.answers[:, None]
  right = jnp.argmax(logits, axis=-1) == targets
  correct = jnp.all(right | ~asked, axis=1)
  costs = jax.nn.log_softmax(logits, axis=-1)
  costs = -jnp.take_along_axis(costs, targets[..., None], axis=-1)[..., 0]
  return correct, jnp.sum(costs, where=asked) / jnp.sum(asked)
