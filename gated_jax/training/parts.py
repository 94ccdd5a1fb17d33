"""The part of a model that a run trains; the rest does not move.

    optimizer.train='all'                every parameter
    optimizer.train='adapters'           those beside frozen matrices
    optimizer.train='!embed,!unembed'    what these patterns choose

Gradients, moments, weight decay and clipping see the part alone: the rest is a
constant of the step, as its batch is. `gated_jax/model/patterns.py` says how
patterns are read.
"""

import dataclasses
from typing import Any

import jax
from flax import traverse_util

from gated_jax import sharding
from gated_jax.config import RunConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import about
from gated_jax.model.patterns import Path
from gated_jax.model.patterns import choose

Tree = Any


@dataclasses.dataclass(frozen=True)
class Part:
  """Some of the parameters of a model.

  Attributes:
    paths: of these parameters; None: all of them, whatever tree they are.
  """

  paths: frozenset[Path] | None = None

  def of(self, params: Tree) -> Tree:
    """The subtree that holds these parameters and no others."""
    if self.paths is None:
      return params
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
      {path: x for path, x in flat.items() if path in self.paths}
    )

  def put(self, part: Tree, params: Tree) -> Tree:
    """All the parameters, with these in the place of their old values."""
    if self.paths is None:
      return part
    flat = traverse_util.flatten_dict(params)
    flat |= traverse_util.flatten_dict(part)
    return traverse_util.unflatten_dict(flat)

  def size(self, params: Tree) -> int:
    """How many numbers these parameters are."""
    return sum(x.size for x in jax.tree.leaves(self.of(params)))


def trained_part(train: str, boxed: Tree) -> Part:
  """What `optimizer.train` chooses of a model.

  Args:
    train: 'all', 'adapters' or patterns.
    boxed: parameters in their boxes; they may be abstract.

  Raises:
    ValueError: a pattern matches nothing, or the model has no adapters.
  """
  if train == 'all':
    return Part()
  facts = about(boxed)
  if train != 'adapters':
    return Part(choose('optimizer.train', train, facts))
  adapters = {p for p, facts in facts.items() if facts.kind is Kind.ADAPTER}
  return Part(frozenset(adapters))


def step_flops(config: RunConfig) -> dict[str, float]:
  """FLOPs of a training step for each token, by part of the model.

  Args:
    config: every setting; what trains decides how much backward computes.
  """
  paths = None
  if config.optimizer.train != 'all':  # else the model need not be traced
    with sharding.inactive():  # the row that is traced has one token
      boxed = boxed_parameters(config.model)
    paths = trained_part(config.optimizer.train, boxed).paths
  return flops_per_token(config.model, config.data.length, paths)
