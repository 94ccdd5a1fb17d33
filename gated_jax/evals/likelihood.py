"""Held-out loss: nats per token, and bits per byte of the text.

Bits per byte compare models whose tokenizers differ; nats per token do not.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import linen as nn

from gated_jax import chips


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Sums over the tokens that were predicted."""

  nats: float  # of all of them
  tokens: float
  text_bytes: float = 0.0  # that they stand for; 0: not known

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
    """What is known, by name."""
    values = {
      'validation/loss': self.loss,
      'validation/perplexity': self.perplexity,
      'validation/bits_per_byte': self.bits_per_byte,
    }
    return {k: v for k, v in values.items() if not math.isnan(v)}


def evaluate(
  model: nn.Module,
  params: Any,
  batches: Iterable[dict[str, Any]],
  text_bytes: float = 0.0,
) -> Likelihood:
  """Loss of all batches; each token counts the same, however they are split.

  Args:
    model: has the method `loss`, which gives `nll`, the mean over the tokens
      with a weight, and `weight`, their sum.
    params: its parameters.
    batches: finite.
    text_bytes: that the targets of all batches stand for; 0: not known.
  """
  arrays = (x for x in jax.tree.leaves(params) if isinstance(x, jax.Array))
  kinds = (d.device_kind for x in arrays for d in x.devices())
  sums = sums_on(next(kinds, ''))
  # Read one batch behind: the next is on its way while the host adds.
  found = [sums(model, params, batch) for batch in batches]
  nats = sum((float(nll) for nll, _ in found), 0.0)
  tokens = sum((float(weight) for _, weight in found), 0.0)
  return Likelihood(nats, tokens, text_bytes)


@functools.cache
def sums_on(kind: str) -> Any:
  """(model, params, batch) to nats of its tokens, and the tokens.

  Args:
    kind: of the devices, as they name it.
  """

  def sums(
    model: nn.Module, params: Any, batch: dict[str, Any]
  ) -> tuple[jax.Array, jax.Array]:
    found: Any = model.apply(
      {'params': params}, batch, method='loss', deterministic=True
    )
    return found.nll * found.weight, found.weight

  return jax.jit(
    sums, static_argnums=0, compiler_options=chips.compiler_options(kind)
  )
