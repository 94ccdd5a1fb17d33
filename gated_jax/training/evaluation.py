"""Measures a model while it trains: held-out loss, and probes.

The held-out batches are read once and kept: every evaluation of a run sees
the same tokens. What is measured is the business of `gated_jax/evals`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gated_jax.data.tokenizer import Tokenizer
from gated_jax.evals import diagnostics
from gated_jax.evals import likelihood

Tree = Any
PROMPT = 32  # tokens of a row in which words for a prompt are looked for
WORDS = 24  # characters of a prompt at most


def prompt_from(
  batches: Sequence[dict[str, np.ndarray]], tokenizer: Tokenizer
) -> str:
  """Some words of held-out text, for a sample to go on from.

  Args:
    batches: of ids that stand for text.
    tokenizer: that made them.
  """
  texts = []
  for tokens in batches[0]['tokens']:
    text = tokenizer.decode(tokens[:PROMPT]).split('\ufffd')[0].strip()
    line = text.splitlines()[0] if text else ''
    if len(line) > WORDS:
      line = line[:WORDS].rpartition(' ')[0] or line[:WORDS]
    texts.append(line)
  return max(texts, key=len)


class Evaluation:
  """Measures parameters on the same batches every time.

  Args:
    model: Has the method `loss`.
    batches: Global device arrays; none where no text is held out.
    text_bytes: Bytes of text that all targets encode; 0: not known.
    probed: How many of the batches the probes look at.
    prompt: Text of the kind that is held out; '': not known.
    sources: What each batch is from.
  """

  def __init__(
    self,
    model: Any,
    batches: Sequence[dict[str, jax.Array]],
    text_bytes: float,
    probed: int = 2,
    prompt: str = '',
    sources: Sequence[str] = (),
  ):
    self.prompt = prompt
    self._sources = sources or [''] * len(batches)
    self._model = model
    self._batches = batches
    self._bytes = text_bytes
    self._probed = batches[:probed]

  def validate(self, params: Tree) -> likelihood.Likelihood:
    """Mean loss over the tokens of all batches, and of each source's."""
    return likelihood.evaluate(
      self._model, params, self._batches, self._bytes, self._sources
    )

  def probe(self, params: Tree) -> Any:
    """The report of `evals.diagnostics`; None without held-out text."""
    if not self._probed:
      return None
    return diagnostics.probe(self._model, params, self._probed)
