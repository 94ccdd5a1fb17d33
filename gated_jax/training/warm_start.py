"""The parameters that a new run starts from, where they are not random.

They are those of another run, or of a model that was imported. The two models
have to compute the same function, but for settings that `init_changes` names.
How layers are laid out may differ: scanned or not, whatever words describe
them.
"""

from typing import Any

import jax

from gated_jax import checkpoint
from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.config import different_function
from gated_jax.model import tree
from gated_jax.model.abstract import abstract_parameters

Tree = Any


def load_start(
  config: RunConfig, abstract: Tree, mesh: jax.sharding.Mesh
) -> Tree:
  """The parameters at `config.init_from`, as a run holds its own.

  Args:
    config: Settings of the new run.
    abstract: Shapes, dtypes and places of its parameters.
    mesh: The devices that they are placed on.

  Raises:
    ValueError: there is no checkpoint, or one of another function.
    CheckpointError: it is damaged.
  """
  there = checkpoint.load_config(config.init_from).model
  check_same_function(there, config)
  if _layout(there) == _layout(config.model):
    return checkpoint.load_parameters(config.init_from, abstract)
  as_there = abstract_parameters(there, mesh)
  with sharding.activate(mesh):
    params = checkpoint.load_parameters(config.init_from, as_there)
    return _laid_out(there, config.model, params, abstract)


def check_same_function(there: ModelConfig, config: RunConfig) -> None:
  """ValueError naming settings that decide the function and differ.

  Args:
    there: The model of the checkpoint.
    config: The new run. A longer or shorter `model.length` alone changes no
      function.
  """
  differing = {
    f'model.{name}': values
    for name, values in different_function(there, config.model).items()
    if name != 'length'
  }
  refused = {
    name: values
    for name, values in differing.items()
    if not any(f'{name}.'.startswith(f'{x}.') for x in config.init_changes)
  }
  if not refused:
    return
  shown = '; '.join(
    f'{name} is {old!r} there and {new!r} here'
    for name, (old, new) in refused.items()
  )
  allowed = (*config.init_changes, *refused)
  raise ValueError(
    f'{config.init_from} computes another function: {shown}. Use its settings, '
    f'as --config=configs/start_from.py:{config.init_from} does, or allow '
    f'them to change with --config.init_changes="{allowed}"'
  )


def _layout(model: ModelConfig) -> tuple[Any, ...]:
  """Decides where layers lie in the tree of parameters."""
  if not model.scan:
    return ()
  return len(model.lead), len(model.pattern)


def _laid_out(
  there: ModelConfig, here: ModelConfig, params: Tree, abstract: Tree
) -> Tree:
  """Parameters of one layout as another holds them."""

  def convert(params: Tree) -> Tree:
    """Stacks or unstacks layers, and casts."""
    apart = tree.unstack(there, params) if there.scan else params
    laid = tree.stack(here, apart) if here.scan else apart
    return jax.tree.map(lambda x, new: x.astype(new.dtype), laid, abstract)

  places = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(convert, out_shardings=places)(params)
