"""Tells whether two models compute the same function of their parameters."""

import dataclasses
from typing import Any

from gated_jax.config.convert import differences
from gated_jax.config.convert import to_dict
from gated_jax.config.gate import GateConfig
from gated_jax.config.layers import ConvConfig
from gated_jax.config.layers import DeltaConfig
from gated_jax.config.layers import RopeConfig
from gated_jax.config.model import ModelConfig
from gated_jax.config.roles import names_with
from gated_jax.config.stack import shortest_pattern
from gated_jax.config.stack import word_of


def canonical(model: ModelConfig) -> ModelConfig:
  """The same model in the fewest words, settings without effect at default."""
  gate = model.gate
  placed = [layer for layer in model.layers if layer.attends]
  first = (*placed, *model.layers)[0]
  mixers = {layer.mixer for layer in model.layers}
  plain = dataclasses.replace(
    model,
    heads=first.heads,
    kv_heads=first.kv_heads,
    head_dim=first.head_dim,
    rope=_rope(model),
    query_growth=0.0,  # none of the words of `plain` is without rotation
    lead=(),
    pattern=('attention+moe' if model.has_experts else 'attention',),
  )
  words = [word_of(layer, plain) for layer in model.layers]
  return dataclasses.replace(
    plain,
    pattern=shortest_pattern(words),
    delta=model.delta if 'gated_deltanet' in mixers else DeltaConfig(),
    conv=model.conv if 'short_conv' in mixers else ConvConfig(),
    query_growth=model.query_growth,
    query_growth_length=model.query_growth_length
    if model.query_growth
    else ModelConfig.query_growth_length,
    gate=gate if gate.position != 'none' else GateConfig(position='none'),
  )


def _rope(model: ModelConfig) -> RopeConfig:
  """The rotary embedding that words can take away from but not add to."""
  used = [layer.rope for layer in model.layers if layer.rope is not None]
  stretched = [rope for rope in used if rope.scaling != 'none']
  rope = next(iter(stretched or used), RopeConfig())
  decisive = {
    name: getattr(rope, name)
    for name in ('base', 'fraction', 'scaling', 'factor', *_OF[rope.scaling])
  }
  return RopeConfig(**decisive)


# Settings that decide something only for one kind of scaling.
_OF: dict[str, tuple[str, ...]] = {
  'none': (),
  'linear': (),
  'proportional': (),
  'llama3': ('original_length', 'low_turns', 'high_turns'),
  'yarn': (
    'original_length',
    'beta_fast',
    'beta_slow',
    'attention_factor',
    'mscale',
    'mscale_all_dim',
    'truncate',
  ),
}


def different_function(
  old: ModelConfig, new: ModelConfig
) -> dict[str, tuple[Any, Any]]:
  """Settings that decide the function and differ: name to (old, new)."""
  decisive = names_with(old, 'model')
  return {
    name: values
    for name, values in differences(
      to_dict(canonical(old)), to_dict(canonical(new))
    ).items()
    if name in decisive
  }
