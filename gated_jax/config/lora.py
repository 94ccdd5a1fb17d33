"""Adapters: what is trained beside matrices that stay as they are."""

import dataclasses
import math
from typing import ClassVar

from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """W + scale A B in the place of a matrix W (LoRA, arXiv 2106.09685)."""

  ROLE: ClassVar[str] = 'model'

  rank: int = 0  # of A B; 0: there are no adapters
  alpha: float = 16.0  # scale = alpha / rank
  rank_stabilized: bool = False  # scale = alpha / sqrt(rank), arXiv 2312.03732
  # Patterns over the names of the matrices that have adapters, as
  # '*/attention' or '*,!*/moe'; see gated_jax/model/patterns.py. Routers and
  # the tables of the vocabulary have none.
  matrices: str = '*'

  def __post_init__(self) -> None:
    finite('model.lora.', self)
    not_negative(**{'model.lora.rank': self.rank})
    positive(**{'model.lora.alpha': self.alpha})
    if not all(word.strip(' !') for word in self.matrices.split(',')):
      raise ValueError(
        f'model.lora.matrices={self.matrices!r} must be patterns with commas '
        'between them, none of them empty'
      )
    changed = (self.alpha, self.rank_stabilized, self.matrices)
    if not self.rank and changed != (16.0, False, '*'):
      raise ValueError(
        'model.lora.rank=0 makes no adapters, and model.lora is set otherwise: '
        'a rank is 1 or more'
      )

  @property
  def scale(self) -> float:
    """What A B is multiplied by."""
    root = math.sqrt(self.rank) if self.rank_stabilized else self.rank
    return self.alpha / root
