"""A decoder for lm-evaluation-harness: perplexity and multiple choice.

    harness = Harness(model, params, tokenizer, mesh)
    lm_eval.simple_evaluate(model=harness, tasks=['lambada_openai'])

Texts are cut into context and answer, and long ones into windows, by the
harness's own code, so that scores are those of its adapter for Hugging Face
models. Here they are sorted by length, padded to few shapes and split over the
mesh. The extra `eval` installs the harness.
"""

import functools
import logging
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
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from gated_jax import sharding
from gated_jax.model.decoder import Decoder

_LOG = logging.getLogger(__name__)
SHORTEST = 32  # positions of the smallest padded shape

# (prompts, largest number of new tokens, strings that end an answer) -> answers
Generate = Callable[[list[str], int, Sequence[str]], list[str]]


class Scored(NamedTuple):
  """Token ids of which the last `answer` are predicted."""

  ids: list[int]
  answer: int


class Harness(TemplateLM):
  """A model as lm-evaluation-harness asks for it.

  Args:
    model: The decoder.
    params: Its parameters, placed on the mesh.
    tokenizer: See gated_jax/data/tokenizer.py.
    mesh: Its batch axes split the rows; None: one device.
    batch: Rows that are computed at a time.
    generate: Needed by tasks that generate text; None: those are refused.
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

  @property
  def eot_token_id(self) -> int:
    """Id that ends a text."""
    return self.tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    """Id that the first token of a text is predicted from."""
    if self.tokenizer.start < 0:
      raise ValueError(
        f'tokenizer {self.tokenizer.name} has no token to begin a text with'
      )
    return self.tokenizer.start

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **unused: Any
  ) -> list[int]:
    """Ids of a text, after the token that its tokenizer puts before it.

    Args:
      string: The text.
      add_special_tokens: False leaves that token out.
      **unused: Options that other adapters have.
    """
    ids = self.tokenizer.encode(string).tolist()
    if add_special_tokens is False or self.tokenizer.bos < 0:
      return ids
    return [self.tokenizer.bos, *ids]

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[tuple[float, bool]]:
    """Nats of each continuation, and whether greedy decoding gives it.

    Raises:
      ValueError: a continuation has no token of its own. Its probability
        would be one, and it would win every comparison.
    """
    for request in requests:
      context, answer = request.args
      if not answer:
        raise ValueError(f'the answer after {_ending(context)} is empty')
    return super().loglikelihood(requests, disable_tqdm)

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = True
  ) -> list[float]:
    """Nats of each whole text, from the beginning of a document on."""
    del disable_tqdm
    owners: list[int] = []
    windows = []
    for i, request in enumerate(requests):
      (text,) = request.args
      cut = utils.get_rolling_token_windows(
        token_list=self.tok_encode(text),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.model.config.length,
        context_len=1,
      )
      for context, answer in map(utils.make_disjoint_window, cut):
        owners.append(i)
        windows.append(((text, ''), context, answer))
    totals = np.zeros(len(requests))
    for owner, (nats, _) in zip(
      owners, self._loglikelihood_tokens(windows), strict=True
    ):
      totals[owner] += nats
    return totals.tolist()

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = True
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
      until = options.get('until') or []
      until = [until] if isinstance(until, str) else until
      count = options.get('max_gen_toks', 256)
      (answer,) = self._generate([context], count, until)
      for end in until:
        answer = answer.split(end)[0] if end else answer
      answers.append(answer)
    return answers

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = True,
    **unused: Any,
  ) -> list[tuple[float, bool]]:
    """Scores answers given as (texts, ids of the context, ids of the answer).

    A context that is too long loses its beginning.
    """
    del disable_tqdm
    longest = self.model.config.length
    rows: list[Scored] = []
    for (context, answer), before, after in requests:
      if not after:
        raise ValueError(
          f'the answer {answer!r} after {_ending(context)} has no token of its '
          f'own: tokenizer {self.tokenizer.name} joins it with the context'
        )
      if not before:
        raise ValueError(
          f'the context {context!r} before {answer!r} has no token, and '
          f'tokenizer {self.tokenizer.name} puts none before a text'
        )
      if len(after) > longest:
        raise ValueError(
          f'the answer {answer[:40]!r} has {len(after)} tokens, and the model '
          f'is built for {longest}'
        )
      # The last token of a row is predicted and not read.
      rows.append(Scored((before + after)[-(longest + 1) :], len(after)))
    lost = sum(
      len(before) + len(after) > longest + 1 for _, before, after in requests
    )
    if lost:
      _LOG.warning(
        '%d of %d contexts are longer than the model reads (%d tokens) and '
        'lose their beginning',
        *(lost, len(requests), longest),
      )
    return self._score(rows)

  def _score(self, rows: list[Scored]) -> list[tuple[float, bool]]:
    """Scores rows in the order of their length, and returns them in theirs."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for begin in range(0, len(rows), self.batch):
      part = order[begin : begin + self.batch]
      nats, greedy = self._call([rows[i] for i in part])
      for i, value, same in zip(part, nats, greedy, strict=False):
        scores[i] = (float(value), bool(same))
    return scores

  def _call(self, rows: list[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of the answers, and whether their tokens are the likeliest."""
    longest = len(rows[0].ids) - 1
    length = min(
      self.model.config.length, max(SHORTEST, 1 << (longest - 1).bit_length())
    )
    shape = (self.batch, length)
    inputs = {
      name: np.zeros(shape, np.int32)
      for name in ('tokens', 'targets', 'segments', 'scored')
    }
    for i, row in enumerate(rows):
      size = len(row.ids) - 1
      inputs['tokens'][i, :size] = row.ids[:-1]
      inputs['targets'][i, :size] = row.ids[1:]
      inputs['segments'][i, :size] = 1
      inputs['scored'][i, size - row.answer : size] = 1
    if self.mesh is None:
      return jax.device_get(_score(self.model, self.params, inputs))
    with sharding.activate(self.mesh):
      placed = jax.device_put(inputs, sharding.batch_sharding(self.mesh))
      return jax.device_get(_score(self.model, self.params, placed))


def _ending(context: str) -> str:
  """The end of a context, for messages."""
  return repr(context) if len(context) <= 40 else f'...{context[-40:]!r}'


@functools.partial(jax.jit, static_argnums=0)
def _score(
  model: Decoder, params: Any, inputs: dict[str, Int[Array, 'B T']]
) -> tuple[Float[Array, ' B'], Bool[Array, ' B']]:
  """Sums the scored positions' log-likelihoods; tells if all are likeliest."""
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
