"""The same function in other parameters: what opens a family to a model.

Each rewrite takes parameters and config and returns both; logits change by
rounding at most, and by nothing where the comment says so. `add_gate` is the
one that makes a model more than it was, at the same function to begin with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.hf.convert import flatten
from gated_jax.hf.convert import unflatten
from gated_jax.model.abstract import abstract_parameters

Tree = Any
Model = tuple[ModelConfig, Tree]


def _gate(config: ModelConfig, **expected: Any) -> GateConfig:
  """The gate, which has to be as expected."""
  for name, value in expected.items():
    if getattr(config.gate, name) != value:
      raise ValueError(
        f'model.gate.{name}={getattr(config.gate, name)!r} cannot be '
        f'rewritten, only {value!r} can'
      )
  return config.gate


def move_norm_scales(config: ModelConfig, params: Tree) -> Model:
  """Norm scales w as w - 1, or the other way round.

  Exact from w to w - 1 where w lies between 1/2 and 2; the way back rounds.
  """
  shift = 1 if config.norm_zero_centered else -1
  flat = {
    path: leaf + jnp.asarray(shift, leaf.dtype)
    if path.endswith('norm/scale')
    else leaf
    for path, leaf in flatten(params).items()
  }
  centered = not config.norm_zero_centered
  config = dataclasses.replace(config, norm_zero_centered=centered)
  return config, unflatten(flat)


def halve_two_sigmoid(config: ModelConfig, params: Tree) -> Model:
  """2 sigmoid(x) as sigmoid(x), the 2 moved into `out`: exact."""
  gate = _gate(
    config,
    position='sdpa_output',
    activation='two_sigmoid',
    mode='multiplicative',
  )
  flat = {
    path: leaf * 2 if path.endswith('attention/out/kernel') else leaf
    for path, leaf in flatten(params).items()
  }
  gate = dataclasses.replace(gate, activation='sigmoid')
  return dataclasses.replace(config, gate=gate), unflatten(flat)


def repeat_headwise(config: ModelConfig, params: Tree) -> Model:
  """A headwise gate as an elementwise one with equal columns: exact.

  The gate then has head_dim times as many parameters, and training on would
  make them differ.
  """
  gate = _gate(
    config, position='sdpa_output', granularity='headwise', source='hidden'
  )

  def repeat(leaf: Any) -> Any:
    """One score per head becomes the same score for each of its channels."""
    return jnp.repeat(jnp.asarray(leaf)[..., None], config.head_dim, axis=-1)

  flat = {
    path: repeat(leaf) if path.endswith('attention/gate/kernel') else leaf
    for path, leaf in flatten(params).items()
  }
  gate = dataclasses.replace(gate, granularity='elementwise')
  return dataclasses.replace(config, gate=gate), unflatten(flat)


REWRITES: dict[str, Callable[[ModelConfig, Tree], Model]] = {
  'norms': move_norm_scales,
  'two_sigmoid': halve_two_sigmoid,
  'headwise': repeat_headwise,
}


def add_gate(
  config: ModelConfig,
  params: Tree,
  granularity: str = 'elementwise',
  mesh: jax.sharding.Mesh | None = None,
) -> Model:
  """An ungated model with a gate that is open: the same logits.

  Its kernel is zero and its activation 2 sigmoid, so every score is exactly
  one. The paper tried this in continued training and found no gain (arXiv
  2505.06708, appendix A.7): attention sinks stayed, and by its author the
  gate hardly moved. It is here for who wants to study that.

  Args:
    config, params: Of the model.
    granularity: 'elementwise' or 'headwise'.
    mesh: Where the new parameters are placed.
  """
  _gate(config, position='none')
  gate = GateConfig(
    granularity=granularity, activation='two_sigmoid', init='zeros'
  )
  config = dataclasses.replace(config, gate=gate)
  old, new = flatten(params), flatten(abstract_parameters(config, mesh))
  for path, place in new.items():
    if path not in old:
      old[path] = jnp.zeros(place.shape, place.dtype, device=place.sharding)
  return config, unflatten(old)
