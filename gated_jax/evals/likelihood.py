"""Held-out loss: nats per token, and bits per byte of the text.

Bits per byte compare models whose tokenizers differ; nats per token do not.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from gated_jax import chips
from gated_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Sums over the tokens that were predicted."""

  nats: float
  tokens: float
  text_bytes: float = 0.0  # UTF-8 bytes that the tokens encode; 0: not known
  # Nats per token of each source; empty where there is only one.
  by_source: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def loss(self) -> float:
    """Nats per token; NaN without tokens."""
    return self.nats / self.tokens if self.tokens else math.nan

  @property
  def perplexity(self) -> float:
    """exp of the loss; infinite where that overflows."""
    try:
      return math.exp(self.loss)
    except OverflowError:
      return math.inf

  @property
  def bits_per_byte(self) -> float:
    """NaN where the number of bytes is not known."""
    if not self.text_bytes:
      return math.nan
    return self.nats / math.log(2) / self.text_bytes

  def scalars(self) -> dict[str, float]:
    """The figures that are known, by name."""
    values = {
      'validation/loss': self.loss,
      'validation/perplexity': self.perplexity,
      'validation/bits_per_byte': self.bits_per_byte,
      **{f'validation/loss/{k}': v for k, v in self.by_source.items()},
    }
    return {k: v for k, v in values.items() if not math.isnan(v)}


def evaluate(
  model: nn.Module,
  params: Any,
  batches: Iterable[dict[str, Any]],
  text_bytes: float = 0.0,
  sources: Iterable[str] = itertools.repeat(''),
) -> Likelihood:
  """Loss of all batches; each token counts the same, however they are split.

  Args:
    model: Has the method `loss`, which gives `nll`, the mean over the tokens
      with a weight, and `weight`, their sum.
    params: Its parameters.
    batches: Finitely many.
    text_bytes: Bytes of text that all targets encode; 0: not known.
    sources: What each batch is from; read after the batch itself.
  """
  arrays = (x for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
  kinds = (d.device_kind for x in arrays for d in x.devices())
  sums = sums_on(next(kinds, ''))
  totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
  ahead: tuple[str, Any] | None = None
  for batch, source in zip(batches, sources, strict=False):
    behind, ahead = ahead, (source, sums(model, params, batch))
    if behind is not None:  # adds while the devices compute the next one
      totals[behind[0]] += [float(x) for x in behind[1]]
  if ahead is not None:
    totals[ahead[0]] += [float(x) for x in ahead[1]]
  nats, tokens = (float(x) for x in sum(totals.values(), np.zeros(2)))
  several = totals if len(totals) > 1 else {}
  by_source = {
    name: Likelihood(float(own[0]), float(own[1])).loss
    for name, own in several.items()
  }
  return Likelihood(nats, tokens, text_bytes, by_source)


def target_bytes(
  data: DataConfig,
  batches: Sequence[Mapping[str, np.ndarray]],
  lengths: np.ndarray,
) -> float:
  """Bytes of text that the predicted tokens encode; 0: not known.

  Args:
    data: Says what the batches are from: random ids stand for no text.
    batches: With targets and their weights.
    lengths: Bytes of each of the tokenizer's tokens. Ids made elsewhere may
      be of a tokenizer that has more.
  """
  if any(part.made_up for _, part in data.parts()):
    return 0.0
  total = 0
  for batch in batches:
    targets = batch['targets'][batch['weights'] > 0]
    if np.any(targets >= len(lengths)):
      return 0.0
    total += int(np.sum(lengths[targets]))
  return float(total)


@functools.cache
def sums_on(kind: str) -> Any:
  """(model, params, batch) to nats of its tokens, and the tokens.

  Args:
    kind: The `device_kind` of the devices.
  """

  def sums(
    model: nn.Module, params: Any, batch: dict[str, Any]
  ) -> tuple[jax.Array, jax.Array]:
    """Summed losses and weights of every position."""
    loss: Any = model.apply(
      {'params': params}, batch, method='loss', deterministic=True
    )
    return loss.nll * loss.weight, loss.weight

  return jax.jit(
    sums, static_argnums=0, compiler_options=chips.compiler_options(kind)
  )
