"""adapter_config.json: what it says of adapters, and what it may not say."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from gated_jax.hf.keys import Keys
from gated_jax.hf.peft import CONFIG

# Keys that change no logits of a trained adapter on its base.
_INERT = frozenset(
  {
    'auto_mapping',
    'corda_config',
    'ensure_weight_tying',
    'eva_config',
    'exclude_modules',
    'inference_mode',
    'layers_pattern',
    'layers_to_transform',
    'loftq_config',
    'lora_ga_config',
    'megatron_config',
    'megatron_core',
    'peft_version',
    'qalora_group_size',
    'revision',
    'runtime_config',
    'target_modules',
    'target_parameters',
    'task_type',
  }
)
# Such an adapter begins with a part of its base, which it takes away there.
_FROM_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')
# Patterns of names as PEFT and its users write them. No other one is tried, as
# a pattern from a file of anybody's could keep the matching busy for ever.
_PATTERN = re.compile(r'\^?(?:[\w-]|\\?\.|\\d\+|\.\*)+\$?', re.ASCII)
_LONGEST = 200  # characters of a pattern


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of an adapter_config.json.

  Attributes:
    rank, alpha: Of every adapter that no pattern is of.
    rank_stabilized: Whether scales go by the root of the rank.
    alphas: By patterns of the names of modules.
    base: The name or folder of the base; '': it is not said.
    dropout: Of the adapters' inputs, in training.
  """

  rank: int
  alpha: float
  rank_stabilized: bool
  alphas: Mapping[str, float]
  base: str
  dropout: float = 0.0

  def _root(self, rank: int) -> float:
    return math.sqrt(rank) if self.rank_stabilized else rank

  @property
  def model_scale(self) -> float:
    """The scale of adapters that no pattern is of."""
    return self.alpha / self._root(self.rank)

  def alpha_for(self, rank: int) -> float:
    """The alpha that has the same scale with another rank."""
    if rank == self.rank:
      return self.alpha
    return self.model_scale * self._root(rank)

  def scale(self, names: Collection[str], rank: int) -> float:
    """The scale of one tensor's adapter.

    Args:
      names: Any that a pattern may have for the tensor.
      rank: Of its adapter.
    """
    alpha = self.alpha
    for pattern, value in self.alphas.items():
      if any(
        re.match(rf'(.*\.)?({pattern})(\.weight)?$', name) for name in names
      ):
        alpha = value
        break
    return alpha / self._root(rank)


def read_settings(values: Mapping[str, Any]) -> Settings:
  """The settings of an adapter_config.json.

  Raises:
    ValueError: it is no LoRA, or has what is not computed here.
  """
  keys = Keys(values, CONFIG)
  kind = keys.take('peft_type', None)
  if kind != 'LORA':
    raise ValueError(
      f'{CONFIG} has peft_type {reprlib.repr(kind)}; only LORA can be read'
    )
  keys.expect('bias', 'none')
  start = keys.take('init_lora_weights', True)
  if isinstance(start, str) and start.lower().startswith(_FROM_BASE):
    keys.refuse(
      f' has init_lora_weights={start!r}, which changes the base as well: let '
      'PEFT save it as a plain adapter'
    )
  rank, alpha = keys.integer('r'), keys.number('lora_alpha')
  if not alpha > 0:
    keys.refuse(f' has lora_alpha={alpha}, which is not positive')
  settings = Settings(
    rank=rank,
    alpha=alpha,
    rank_stabilized=keys.flag('use_rslora', False),
    alphas=_alphas(keys),
    base=keys.take('base_model_name_or_path', None) or '',
    dropout=keys.number('lora_dropout') if values.get('lora_dropout') else 0.0,
  )
  keys.take('rank_pattern', {})  # the shapes of A say it
  on = {
    key: value
    for key, value in values.items()
    if key not in keys.taken and key not in _INERT and value
  }
  if on:
    shown = ', '.join(f'{k}={reprlib.repr(v)}' for k, v in sorted(on.items()))
    keys.refuse(f' has {shown}, which adapters here do not have')
  if keys.refused:
    raise ValueError('; '.join(keys.refused))
  return settings


def _alphas(keys: Keys) -> dict[str, float]:
  """alpha_pattern, whose patterns are plain and whose values are positive."""
  alphas = keys.take('alpha_pattern', {}) or {}
  if not isinstance(alphas, dict):
    raise ValueError(f'{CONFIG}: alpha_pattern is no object')
  for pattern, value in alphas.items():
    if len(pattern) > _LONGEST or not _PATTERN.fullmatch(pattern):
      raise ValueError(
        f'{CONFIG} has alpha_pattern {reprlib.repr(pattern)}; only names with '
        r'.* and \d+ in them can be read'
      )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
      raise ValueError(
        f'{CONFIG} has alpha_pattern {pattern}={value!r}, which is no positive '
        'number'
      )
  return alphas
