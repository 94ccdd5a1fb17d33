"""Tells whether two models compute the same function of their parameters."""

import dataclasses
from typing import Any

from gated_jax.config.convert import differences
from gated_jax.config.convert import to_dict
from gated_jax.config.gate import GateConfig
from gated_jax.config.layers import RopeConfig
from gated_jax.config.model import ModelConfig
from gated_jax.config.roles import names_with
from gated_jax.config.stack import shortest_pattern
from gated_jax.config.stack import word_of


def canonical(model: ModelConfig) -> ModelConfig:
  """The same model in the fewest words, settings without effect at default."""
  words = [word_of(layer, model) for layer in model.layers]
  rope, gate = model.rope, model.gate
  if rope.scaling != 'yarn':
    rope = RopeConfig(
      base=rope.base,
      fraction=rope.fraction,
      scaling=rope.scaling,
      factor=rope.factor,
    )
  return dataclasses.replace(
    model,
    lead=(),
    pattern=shortest_pattern(words),
    rope=rope,
    gate=gate if gate.position != 'none' else GateConfig(position='none'),
  )


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
