"""Adapters: what is trained beside matrices that stay as they are."""

import dataclasses
import math
from typing import ClassVar

from gated_jax.config.checks import below_one
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.roles import setting


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """W + scale A B in the place of a matrix W (LoRA, arXiv 2106.09685)."""

  ROLE: ClassVar[str] = 'model'

  rank: int = 0  # columns of A, rows of B; 0: there are no adapters
  alpha: float = 16.0  # scale = alpha / rank
  rank_stabilized: bool = False  # scale = alpha / sqrt(rank), arXiv 2312.03732
  # Patterns over the names of the matrices that have adapters, as
  # '*/attention' or '*,!*/moe'; see gated_jax/model/patterns.py. Routers and
  # the tables of the vocabulary have none.
  matrices: str = '*'
  # The share of an adapter's inputs that training drops. Adapters of experts
  # are added to their matrices and have no inputs of their own.
  dropout: float = setting(0.0, 'execution')

  def __post_init__(self) -> None:
    finite('model.lora.', self)
    not_negative(**{'model.lora.rank': self.rank})
    positive(**{'model.lora.alpha': self.alpha})
    below_one(**{'model.lora.dropout': self.dropout})
    if not all(word.strip(' !') for word in self.matrices.split(',')):
      raise ValueError(
        f'model.lora.matrices={self.matrices!r} must be patterns with commas '
        'between them, none of them empty'
      )
    defaults = tuple(field.default for field in dataclasses.fields(self))
    if not self.rank and dataclasses.astuple(self) != defaults:
      raise ValueError(
        'model.lora.rank=0 makes no adapters, and model.lora is set otherwise: '
        'a rank is 1 or more'
      )

  @property
  def scale(self) -> float:
    """The factor of A B."""
    root = math.sqrt(self.rank) if self.rank_stabilized else self.rank
    return self.alpha / root
