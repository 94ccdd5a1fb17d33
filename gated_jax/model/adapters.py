"""Adapters in a tree of parameters: taken out, put in, added to their base.

An adapter lies beside its matrix: `kernel`, `kernel_lora_a`, `kernel_lora_b`.
`gated_jax/model/low_rank.py` says what they compute.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from gated_jax import sharding
from gated_jax.config import LoraConfig
from gated_jax.config import ModelConfig
from gated_jax.model import parameters
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.low_rank import NAMES
from gated_jax.model.low_rank import add_product
from gated_jax.model.patterns import Path
from gated_jax.model.patterns import choose

Tree = Any


def plain(config: ModelConfig) -> ModelConfig:
  """The same model without adapters."""
  return dataclasses.replace(config, lora=LoraConfig())


def is_adapter(path: Path) -> bool:
  """True for the path of one of the two matrices of an adapter."""
  return path[-1].endswith(NAMES)


def adapted(config: ModelConfig) -> dict[Path, parameters.About]:
  """The matrices that have an adapter, and what they say of themselves.

  Raises:
    ValueError: a pattern of `model.lora.matrices` matches no matrix, or
      dropout is asked for and would act on none of them.
  """
  if not config.lora.rank:
    return {}
  # The row that is traced has one token, which no mesh could split.
  with sharding.inactive():
    facts = parameters.about(boxed_parameters(plain(config)))
  may = {
    path: about
    for path, about in facts.items()
    if about.inputs and about.kind in parameters.ADAPTED
  }
  paths = choose('model.lora.matrices', config.lora.matrices, may)
  chosen = {path: may[path] for path in paths}
  dropout = config.lora.dropout
  if dropout and all(about.of_experts for about in chosen.values()):
    raise ValueError(
      f'model.lora.dropout={dropout} does nothing: model.lora.matrices='
      f'{config.lora.matrices!r} are of experts alone, whose adapters have no '
      'inputs to drop'
    )
  return chosen


def without(params: Mapping[str, Any]) -> Tree:
  """The parameters of the base alone."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: x for path, x in flat.items() if not is_adapter(path)}
  )


def alone(params: Mapping[str, Any]) -> Tree:
  """The adapters, without the parameters of their base."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict(
    {path: x for path, x in flat.items() if is_adapter(path)}
  )


def put(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Tree:
  """A base with the adapters of another tree of the same model."""
  flat = traverse_util.flatten_dict(base)
  more = traverse_util.flatten_dict(adapters)
  flat |= {path: x for path, x in more.items() if is_adapter(path)}
  return traverse_util.unflatten_dict(flat)


def merge(
  config: ModelConfig, params: Mapping[str, Any], keep_dtype: bool = False
) -> tuple[ModelConfig, Tree]:
  """The same function as a model without adapters.

  Args:
    config: of the model.
    params: its parameters, adapters among them where the config has some.
    keep_dtype: sums are rounded to the type their matrix is stored in;
      otherwise they are float32 at least, and no bit is lost.
  """
  if not config.lora.rank:
    return config, params
  flat = traverse_util.flatten_dict(params)
  merged = {path: x for path, x in flat.items() if not is_adapter(path)}
  for path, about in adapted(config).items():
    a, b = (flat[(*path[:-1], path[-1] + name)] for name in NAMES)
    total = add_product(flat[path], a, b, config.lora.scale, about.inputs)
    merged[path] = total.astype(flat[path].dtype) if keep_dtype else total
  return plain(config), traverse_util.unflatten_dict(merged)
