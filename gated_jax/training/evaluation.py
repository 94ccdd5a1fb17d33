"""What is measured while a model trains: held-out loss, and probes.

The held-out batches are read once and kept: every evaluation of a run sees
the same tokens. What the probes measure is the business of `gated_jax/evals`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gated_jax.evals import diagnostics

Tree = Any


@dataclasses.dataclass(frozen=True)
class Validation:
  """Held-out loss; NaN where nothing is held out or bytes are unknown."""

  nats: float = math.nan  # per token
  bits_per_byte: float = math.nan

  def scalars(self) -> dict[str, float]:
    values = {
      'validation/loss': self.nats,
      'validation/bits_per_byte': self.bits_per_byte,
    }
    return {k: v for k, v in values.items() if math.isfinite(v)}


def target_bytes(
  batches: Sequence[dict[str, np.ndarray]], lengths: np.ndarray
) -> float:
  """Bytes of text that the predicted tokens of these batches stand for."""
  return float(
    sum(
      np.sum(
        lengths[np.clip(batch['targets'], 0, len(lengths) - 1)]
        * (batch['weights'] > 0)
      )
      for batch in batches
    )
  )


class Evaluation:
  """Measures parameters on the same batches every time.

  Args:
    model: Has the method `loss`.
    batches: Global device arrays.
    text_bytes: That the targets of all batches stand for; 0: not known.
    probe_batches: How many of them the probes look at.
  """

  def __init__(
    self,
    model: Any,
    batches: Sequence[dict[str, jax.Array]],
    text_bytes: float,
    probe_batches: int = 1,
  ):
    self._model = model
    self._batches = batches
    self._bytes = text_bytes
    self._probed = batches[:probe_batches]

    def loss(params, batch):
      value = model.apply(
        {'params': params}, batch, method='loss', deterministic=True
      )
      return value.nll * value.weight, value.weight

    self._loss = jax.jit(loss)

  def validate(self, params: Tree) -> Validation:
    """Mean loss over the tokens of all batches."""
    if not self._batches:
      return Validation()
    sums = [self._loss(params, batch) for batch in self._batches]
    nats = sum(float(nll) for nll, _ in sums)
    tokens = sum(float(weight) for _, weight in sums)
    if not tokens:
      return Validation()
    per_byte = nats / math.log(2) / self._bytes if self._bytes else math.nan
    return Validation(nats / tokens, per_byte)

  def probe(self, params: Tree) -> Any:
    """What `evals.diagnostics` finds; None without held-out text."""
    if not self._probed:
      return None
    return diagnostics.probe(self._model, params, self._probed)
