"""What is measured while a model trains: held-out loss, and probes.

The held-out batches are read once and kept: every evaluation of a run sees
the same tokens. What is measured is the business of `gated_jax/evals`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gated_jax.config import DataConfig
from gated_jax.evals import diagnostics
from gated_jax.evals import likelihood

Tree = Any


def target_bytes(
  data: DataConfig,
  batches: Sequence[dict[str, np.ndarray]],
  lengths: np.ndarray,
) -> float:
  """Bytes of text that the predicted tokens stand for; 0: not known.

  Args:
    data: Where the batches are from: random ids stand for no text.
    batches: With targets and their weights.
    lengths: Of each of the tokenizer's tokens. Ids made elsewhere may be of a
      tokenizer that has more.
  """
  if any(part.source == 'synthetic' for _, part in data.parts()):
    return 0.0
  total = 0
  for batch in batches:
    targets = batch['targets'][batch['weights'] > 0]
    if np.any(targets >= len(lengths)):
      return 0.0
    total += int(np.sum(lengths[targets]))
  return float(total)


class Evaluation:
  """Measures parameters on the same batches every time.

  Args:
    model: Has the method `loss`.
    batches: Global device arrays; none where no text is held out.
    text_bytes: That the targets of all batches stand for; 0: not known.
    probed: How many of them the probes look at.
  """

  def __init__(
    self,
    model: Any,
    batches: Sequence[dict[str, jax.Array]],
    text_bytes: float,
    probed: int = 2,
  ):
    self._model = model
    self._batches = batches
    self._bytes = text_bytes
    self._probed = batches[:probed]

  def validate(self, params: Tree) -> likelihood.Likelihood:
    """Mean loss over the tokens of all batches."""
    return likelihood.evaluate(self._model, params, self._batches, self._bytes)

  def probe(self, params: Tree) -> Any:
    """What `evals.diagnostics` finds; None without held-out text."""
    if not self._probed:
      return None
    return diagnostics.probe(self._model, params, self._probed)
