"""The parameters that a new run starts from, where they are not random.

They are those of another run, or of a model that was imported. The two models
have to compute the same function, but for settings that `init_changes` names.
How layers are laid out may differ: scanned or not, whatever words describe
them. What only the new model has begins fresh where it can be added to a
trained one (`gated_jax/model/additions.py`) and `init_changes` lets it differ;
adapters that only the other has are added to their matrices.
"""

import functools
from typing import Any

import jax
from flax import traverse_util

from gated_jax import checkpoint
from gated_jax import sharding
from gated_jax.checkpoint.base import Base
from gated_jax.checkpoint.base import base_for
from gated_jax.checkpoint.sums import records
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.config import different_function
from gated_jax.model import adapters
from gated_jax.model import additions
from gated_jax.model import tree
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.patterns import Path
from gated_jax.training.parts import trained_part

Tree = Any


def load_start(
  config: RunConfig, abstract: Tree, mesh: jax.sharding.Mesh, fresh: Tree = None
) -> Tree:
  """The parameters at `config.init_from`, as a run holds its own.

  Args:
    config: Settings of the new run.
    abstract: Shapes, dtypes and places of its parameters.
    mesh: The devices that they are placed on.
    fresh: The run's parameters at random, from which those are taken that are
      not at `config.init_from`.

  Raises:
    ValueError: there is no checkpoint, or one of another function.
    CheckpointError: it is damaged.
  """
  there = checkpoint.load_config(config.init_from).model
  check_same_function(there, config)
  here = config.model
  wanted, begins_fresh = _apart(there, config, abstract)
  params = _load(config.init_from, there, here, wanted, mesh)
  if not begins_fresh:
    return params
  flat = traverse_util.flatten_dict(params)
  random = traverse_util.flatten_dict(fresh)
  flat |= {path: random[path] for path in begins_fresh}
  return traverse_util.unflatten_dict(flat)


def _apart(
  there: ModelConfig, config: RunConfig, abstract: Tree
) -> tuple[Tree, set[Path]]:
  """What a checkpoint fills of a run's parameters, and what begins fresh.

  Raises:
    ValueError: they differ by more than can be added.
  """
  convert = functools.partial(_laid_out, there, config.model)
  given = jax.eval_shape(convert, abstract_parameters(there))
  old = traverse_util.flatten_dict(given).keys()
  flat = traverse_util.flatten_dict(abstract)
  new = flat.keys() - old
  unknown = {path for path in new if not additions.can_be_added(path)}
  differing = unknown or old - flat.keys()
  if differing:
    names = ', '.join(sorted('/'.join(path) for path in differing))
    which = 'does not have' if unknown else 'has, and this run does not:'
    raise ValueError(
      f'{config.init_from} {which} {names}; only {additions.NAMES} can be '
      'added to a trained model'
    )
  wanted = {path: x for path, x in flat.items() if path in old}
  return traverse_util.unflatten_dict(wanted), new


def _load(
  path: str,
  there: ModelConfig,
  here: ModelConfig,
  abstract: Tree,
  mesh: jax.sharding.Mesh,
) -> Tree:
  """Parameters of one model as another of the same function holds them."""
  if _same_arrays(there, here):
    return checkpoint.load_parameters(path, abstract)
  as_there = abstract_parameters(there, mesh)
  places = jax.tree.map(lambda x: x.sharding, abstract)

  def convert(params: Tree) -> Tree:
    """Lays them out anew and casts them."""
    laid = _laid_out(there, here, params)
    return jax.tree.map(lambda x, new: x.astype(new.dtype), laid, abstract)

  with sharding.activate(mesh):
    params = checkpoint.load_parameters(path, as_there)
    return jax.jit(convert, out_shardings=places)(params)


def check_same_function(there: ModelConfig, config: RunConfig) -> None:
  """ValueError naming settings that decide the function and differ.

  Args:
    there: The model of the checkpoint.
    config: The new run. A longer or shorter `model.length` alone changes no
      function.
  """
  # Adapters that one side lacks are fresh ones, or are added to their base.
  one_sided = not (there.lora.rank and config.model.lora.rank)
  differing = {
    f'model.{name}': values
    for name, values in different_function(there, config.model).items()
    if name != 'length' and not (one_sided and name.startswith('lora.'))
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


def _same_arrays(there: ModelConfig, here: ModelConfig) -> bool:
  """True where arrays of one name are the same ones in both models."""
  merged = there.lora.rank and not here.lora.rank
  return _layout(there) == _layout(here) and not merged


def base_of_start(config: RunConfig, params: Tree) -> Base | None:
  """The base that the checkpoints of a new run leave what is frozen with.

  Args:
    config: Settings of the run.
    params: Its parameters before the first step.

  Returns:
    None where checkpoints have to hold everything.
  """
  train = config.optimizer.train
  if not config.init_from or config.checkpoint.whole or train == 'all':
    return None
  there = checkpoint.load_config(config.init_from).model
  if not _same_arrays(there, config.model):
    return None
  trained = trained_part(train, boxed_parameters(config.model)).paths or ()
  frozen = traverse_util.unflatten_dict(
    {
      path: x
      for path, x in traverse_util.flatten_dict(params).items()
      if path not in trained
    }
  )
  arrays = records(frozen, 'params')
  return base_for(config.init_from, arrays, arrays)


def _layout(model: ModelConfig) -> tuple[Any, ...]:
  """Decides where layers lie in the tree of parameters."""
  if not model.scan:
    return ()
  return len(model.lead), len(model.pattern)


def _laid_out(there: ModelConfig, here: ModelConfig, params: Tree) -> Tree:
  """Parameters of one layout as another holds them.

  Adapters that are here no more are added to their matrices.
  """
  if not here.lora.rank:
    _, params = adapters.merge(there, params)
  apart = tree.unstack(there, params) if there.scan else params
  return tree.stack(here, apart) if here.scan else apart
