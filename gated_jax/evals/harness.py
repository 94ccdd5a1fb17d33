"""A decoder for lm-evaluation-harness: perplexity and multiple choice.

    harness = Harness(model, params, tokenizer, mesh)
    lm_eval.simple_evaluate(model=harness, tasks=['lambada_openai'])

Requests are cut into windows of the model's length, sorted by length, padded
to few shapes and split over the mesh. Every token is predicted once, from at
least half a window of text where there is so much before it. The extra `eval`
installs the harness.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from gated_jax import sharding
from gated_jax.model.decoder import Decoder

# Prompts, the most new tokens, and texts that end an answer, to answers.
Generate = Callable[[list[str], int, Sequence[str]], list[str]]


class Window(NamedTuple):
  """Tokens of which the last `scored` are predicted."""

  request: int
  tokens: np.ndarray
  scored: int


class Harness(LM):
  """See the file.

  Args:
    model: the decoder.
    params: its parameters, placed on the mesh.
    tokenizer: with `bos`, `eos` and `encode`; see gated_jax/data/tokenizer.py.
    mesh: whose batch axes split rows; None: one device.
    batch: rows of a call.
    generate: for tasks that generate; None: those are refused.
  """

  def __init__(
    self,
    model: Decoder,
    params: Any,
    tokenizer: Any,
    mesh: jax.sharding.Mesh | None = None,
    *,
    batch: int = 8,
    generate: Generate | None = None,
  ):
    super().__init__()
    if batch < 1:
      raise ValueError(f'{batch=} must be positive')
    if tokenizer.vocab > model.config.vocab:
      raise ValueError(
        f'the tokenizer has {tokenizer.vocab} tokens, and the model '
        f'{model.config.vocab}'
      )
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self.mesh, self.batch, self._generate = mesh, batch, generate

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Of each continuation: nats, and whether greedy decoding gives it."""
    del disable_tqdm
    windows = []
    for i, request in enumerate(requests):
      before, after = self._pair(*request.args)
      windows += self._windows(i, before, after)
    return self._score(len(requests), windows)

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Nats of each whole text, from the beginning of a document on."""
    del disable_tqdm
    windows = []
    for i, request in enumerate(requests):
      tokens = self.tokenizer.encode(request.args[0])
      windows += self._windows(i, self._start(), tokens)
    return [nats for nats, _ in self._score(len(requests), windows)]

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Text after each context, up to one of the strings that end it."""
    del disable_tqdm
    if self._generate is None:
      raise NotImplementedError(
        'this task generates text: give Harness the argument generate'
      )
    answers = []
    for request in requests:
      context, options = request.args
      until = options.get('until', [])
      until = [until] if isinstance(until, str) else until
      count = options.get('max_gen_toks', 256)
      (answer,) = self._generate([context], count, until)
      for end in until:
        answer = answer.split(end)[0] if end else answer
      answers.append(answer)
    return answers

  def _start(self) -> np.ndarray:
    """What stands before a document: without it its first token has nothing."""
    if self.tokenizer.bos < 0:
      raise ValueError(
        f'tokenizer {self.tokenizer.name} has no token to begin a text with'
      )
    return np.array([self.tokenizer.bos], np.int32)

  def _pair(self, context: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of both, cut where the tokens of the whole text allow it."""
    start = self._start()
    # Spaces belong to the word they stand before.
    bare = context.rstrip()
    answer, context = context[len(bare) :] + answer, bare
    first = self.tokenizer.encode(context)
    whole = self.tokenizer.encode(context + answer)
    return np.concatenate([start, first]), whole[len(first) :]

  def _windows(
    self, request: int, before: np.ndarray, after: np.ndarray
  ) -> list[Window]:
    """Cuts what is predicted into pieces; each sees what fits before it."""
    tokens = np.concatenate([before, after])
    longest = self.model.config.length
    found, done = [], len(before)
    while done < len(tokens):
      # The last token of a window is predicted and not read.
      end = min(len(tokens), max(done + longest // 2, longest + 1))
      first = max(0, end - longest - 1)
      found.append(Window(request, tokens[first:end], end - done))
      done = end
    return found

  def _score(
    self, count: int, windows: list[Window]
  ) -> list[tuple[float, bool]]:
    nats, greedy = np.zeros(count), np.ones(count, bool)
    windows = sorted(windows, key=lambda w: -len(w.tokens))
    for i in range(0, len(windows), self.batch):
      part = windows[i : i + self.batch]
      found = self._call(part)
      for window, value, same in zip(part, *found, strict=False):
        nats[window.request] += value
        greedy[window.request] &= bool(same)
    return list(zip(nats.tolist(), greedy.tolist(), strict=True))

  def _call(self, part: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each window, and whether its tokens are the likeliest."""
    longest = len(part[0].tokens) - 1
    length = min(
      self.model.config.length, max(32, 1 << (longest - 1).bit_length())
    )
    shape = (self.batch, length)
    inputs = {
      name: np.zeros(shape, np.int32)
      for name in ('tokens', 'targets', 'segments', 'scored')
    }
    for row, window in enumerate(part):
      size = len(window.tokens) - 1
      inputs['tokens'][row, :size] = window.tokens[:-1]
      inputs['targets'][row, :size] = window.tokens[1:]
      inputs['segments'][row, :size] = 1
      inputs['scored'][row, size - window.scored : size] = 1
    if self.mesh is None:
      return jax.device_get(_score(self.model, self.params, inputs))
    with sharding.activate(self.mesh):
      placed = jax.device_put(inputs, sharding.batch_sharding(self.mesh))
      return jax.device_get(_score(self.model, self.params, placed))


@functools.partial(jax.jit, static_argnums=0)
def _score(
  model: Decoder, params: Any, inputs: dict[str, Int[Array, 'B T']]
) -> tuple[Float[Array, ' B'], Bool[Array, ' B']]:
  logits: Any = model.apply(
    {'params': params}, inputs['tokens'], segments=inputs['segments']
  )
  targets, scored = inputs['targets'], inputs['scored'] != 0
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nats = picked - jax.nn.logsumexp(logits, axis=-1)
  same = jnp.argmax(logits, axis=-1) == targets
  return (
    jnp.sum(jnp.where(scored, nats, 0), axis=1),
    jnp.all(same | ~scored, axis=1),
  )
