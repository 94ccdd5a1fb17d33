"""Refuses models that cannot fit, before anything is made of their sizes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gated_jax import memory
from gated_jax.config import ModelConfig
from gated_jax.model.abstract import boxed_parameters


def check_fits(config: ModelConfig, devices: Sequence[jax.Device]) -> None:
  """ValueError where a model's parameters need more memory than there is.

  Args:
    config: Settings of the model; its sizes may be absurd.
    devices: The ones that hold the parameters.
  """
  what = (
    f'the parameters of a model with depth={config.depth}, '
    f'width={config.width}, vocab={config.vocab}'
  )
  memory.check(what, least_bytes(config), devices)
  # A scan has the same parameters, and is traced in no time at any depth.
  boxed = boxed_parameters(dataclasses.replace(config, scan=True))
  memory.check(what, memory.size_of(boxed), devices)


def least_bytes(config: ModelConfig) -> int:
  """Bytes that parameters have at least: embedding, norms, one projection.

  Tracing a model makes tables as long as a head is wide, and a list of its
  layers. This needs neither.
  """
  widest = max(layer.heads * layer.head_dim for layer in config.distinct_layers)
  rows = config.vocab + config.depth + widest
  return rows * config.width * jnp.dtype(config.param_dtype).itemsize
