"""Parameters in the form that decoding reads fastest.

Layers stand apart, so that each one's cache is updated where it lies, adapters
are added to their matrices, and those are in the dtype they are used in, so
that a step reads no more bytes than it needs. None of it changes any bit of a
logit.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gated_jax import sharding
from gated_jax.checkpoint import load_config
from gated_jax.checkpoint import load_parameters
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.model import adapters
from gated_jax.model import parameters
from gated_jax.model import tree
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.model.size import check_fits

Params = Mapping[str, Any]


def for_decoding(
  config: ModelConfig, params: Params
) -> tuple[ModelConfig, Params]:
  """The same model with layers apart and matrices as they are used.

  The attention that training asked for by name need not know of a cache, so
  decoding takes what the platform has.

  Args:
    config: Settings of the model.
    params: Its parameters, stacked if `config.scan`.
  """
  new = dataclasses.replace(
    adapters.plain(config), scan=False, remat='none', attention='auto'
  )
  return new, _convert(config, params)


@functools.partial(jax.jit, static_argnums=0)
def _convert(config: ModelConfig, params: Params) -> Params:
  dtype = jnp.dtype(config.dtype)
  config, params = adapters.merge(config, params)
  facts = parameters.about(boxed_parameters(config))

  def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """A parameter in the type that decoding reads it in."""
    kind = facts[tuple(str(part.key) for part in path)].kind
    return x if kind in parameters.FLOAT32 else x.astype(dtype)

  return tree.unstack(config, jax.tree_util.tree_map_with_path(cast, params))


def load(
  checkpoint: str | os.PathLike[str], mesh: jax.sharding.Mesh
) -> tuple[RunConfig, Decoder, Params]:
  """A run's config, and its model ready for `generate`.

  Args:
    checkpoint: The folder of a step, or of a run for its newest one.
    mesh: The devices that the parameters are placed on.

  Raises:
    ValueError: there is no checkpoint.
    CheckpointError: it cannot be read.
  """
  run = load_config(checkpoint)
  check_fits(run.model, list(mesh.devices.flat))
  params = load_parameters(checkpoint, abstract_parameters(run.model, mesh))
  with sharding.activate(mesh):
    config, params = for_decoding(run.model, params)
  return run, Decoder(config), params
