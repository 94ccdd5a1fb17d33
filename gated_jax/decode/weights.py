"""Parameters in the form that decoding reads fastest.

Layers stand apart, so that each one's cache is updated where it lies, and
matrices are in the dtype they are used in, so that a step reads no more bytes
than it needs. Neither changes a logit by a bit.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from gated_jax import sharding
from gated_jax.checkpoint import load_config
from gated_jax.checkpoint import load_parameters
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.model.decoder import Decoder

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
  new = dataclasses.replace(config, scan=False, remat='none', attention='auto')
  return new, _convert(config, params)


@functools.partial(jax.jit, static_argnums=0)
def _convert(config: ModelConfig, params: Params) -> Params:
  flat = traverse_util.flatten_dict(params)
  dtype = jnp.dtype(config.dtype)
  found = {}
  for path, x in flat.items():
    # Norms and the router compute in float32 from what is stored.
    if path[-1] != 'scale' and 'router' not in path:
      x = x.astype(dtype)
    if not (config.scan and path[0] == 'layers'):
      found[path] = x
      continue
    pattern = len(config.windows)
    within, rest = 0, path[1:]
    if pattern > 1:
      within, rest = int(rest[0].removeprefix('block_')), rest[1:]
    for i in range(config.depth // pattern):
      found[f'layers_{i * pattern + within}', *rest] = x[i]
  return traverse_util.unflatten_dict(found)


def abstract_parameters(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Shapes, dtypes and places of a model's parameters."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  boxed = boxed['params']
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    meta.unbox(boxed),
    sharding.shardings(mesh, boxed),
  )


def load(
  checkpoint: str | pathlib.Path, mesh: jax.sharding.Mesh
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
  params = load_parameters(checkpoint, abstract_parameters(run.model, mesh))
  with sharding.activate(mesh):
    config, params = for_decoding(run.model, params)
  return run, Decoder(config), params
