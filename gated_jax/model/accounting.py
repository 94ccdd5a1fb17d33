"""How many parameters a model has, and how many FLOPs a token costs it.

Both are sums over the parameters that the model makes, each of which says what
it is (`parameters.py`), and over what its mixers compute beside their matrices.
Where a part of the model trains, backward computes less: `stages.py` has the
order in which it goes. Nothing is allocated.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.model import parameters as kinds
from gated_jax.model import stages
from gated_jax.model import tree
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.low_rank import NAMES
from gated_jax.model.mixers import mixer_named
from gated_jax.model.parameters import Kind
from gated_jax.model.patterns import Path


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """One array of a model: its part in the sums, its numbers and its place.

  Attributes:
    part: embed, unembed, norms, gate, router, experts, mlp, adapters, or a
      mixer's word.
    size: of the array.
    active: how many of them one token uses; of experts those that it chooses.
    about: facts about it.
    layers: that own a slice of it each; none: it lies outside of them.
    within: its path below a layer, or its whole path.
  """

  part: str
  size: int
  active: int
  about: kinds.About
  layers: tuple[int, ...]
  within: Path

  def paths(self, config: ModelConfig) -> dict[int | None, Path]:
    """Where the model keeps it, for each of its layers."""
    if not self.layers:
      return {None: self.within}
    return {
      layer: (*tree.address(config, layer).path, *self.within)
      for layer in self.layers
    }


def _part(
  config: ModelConfig, path: tuple[str, ...], about: kinds.About
) -> str:
  """The name under which a parameter is counted."""
  by_kind = {
    Kind.GATE: 'gate',
    Kind.GATE_SCORES: 'gate',
    Kind.ROUTER: 'router',
    Kind.LOAD_BIAS: 'router',
    Kind.ADAPTER: 'adapters',
    Kind.EMBEDDING: path[0],
  }
  if about.kind in by_kind:
    return by_kind[about.kind]
  if about.kind not in (Kind.MATRIX, Kind.FILTER):
    return 'norms'
  layer = tree.layer_of(config, path)
  if layer is None:
    raise ValueError(f'the matrix {"/".join(path)} lies in no layer')
  within = path[len(tree.address(config, layer).path)]
  return 'experts' if within == 'moe' else within


def _all(config: ModelConfig) -> list[_Parameter]:
  # The same numbers, and only one repetition of the pattern to trace.
  config = dataclasses.replace(config, scan=True)
  with sharding.inactive():  # the row that is traced has one token
    boxed = boxed_parameters(config)
  facts = kinds.about(boxed)
  shapes: Any = jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))
  places = [tree.address(config, layer).path for layer in range(config.depth)]
  result = []
  for path, leaf in shapes:
    names = tuple(str(part.key) for part in path)
    about, size = facts[names], math.prod(leaf.shape)
    active = size
    if about.of_experts:
      active = size * config.moe.top_k // config.moe.experts
    part = _part(config, names, about)
    layers = tuple(
      layer
      for layer, place in enumerate(places)
      if names[: len(place)] == place
    )
    within = names[len(places[layers[0]]) :] if layers else names
    result.append(_Parameter(part, size, active, about, layers, within))
  return result


def parameters(config: ModelConfig) -> dict[str, int]:
  """Parameters by part, their `total`, and how many a token uses (`active`).

  Active are all but the experts that a token does not choose; an embedding
  counts whole.
  """
  counts: dict[str, int] = {}
  every = _all(config)
  for parameter in every:
    counts[parameter.part] = counts.get(parameter.part, 0) + parameter.size
  total = sum(parameter.size for parameter in every)
  active = sum(parameter.active for parameter in every)
  return {**counts, 'total': total, 'active': active}


def flops_per_token(
  config: ModelConfig, length: int, trained: Collection[Path] | None = None
) -> dict[str, float]:
  """FLOPs to train on one token, by part: forward and backward.

  Products of matrices alone, two FLOPs for each multiplication, and only what
  the mathematics needs: keys that causality and windows leave visible, experts
  that are chosen, nothing recomputed; of backward the gradients of what trains,
  and of inputs that something trained has acted on. Rows are taken as one
  document; shorter ones cost less attention.

  Args:
    config: of the model.
    length: tokens in a row.
    trained: paths of the parameters that train; None: all, which makes
      backward twice as dear as forward; none at all: forward alone.

  Returns:
    FLOPs of each part; a mixer's matrices are its `_projections`.
  """
  flops: dict[str, float] = {}

  def add(part: str, forward: float, passes: int) -> None:
    """Counts a part's products as often as they are computed."""
    flops[part] = flops.get(part, 0.0) + passes * forward

  every = _all(config)
  backward = _Backward(config, every, trained)
  mixers = {spec.mixer for spec in config.layers}
  for parameter in every:
    if parameter.about.kind in kinds.MULTIPLIED:
      part = parameter.part
      part += '_projections' if part in mixers else ''
      for layer in parameter.layers:
        forward = 2.0 * parameter.active / len(parameter.layers)
        add(part, forward, backward.passes(parameter, layer))
  add('logits', 2.0 * config.vocab * config.width, backward.passes_of_logits())
  for number, spec in enumerate(config.layers):
    forward = mixer_named(spec.mixer).flops(config, spec, length)
    # Both operands of these products are activations.
    passes = 3 if backward.reaches(stages.core(number)) else 1
    add(spec.mixer, forward, passes)
  return flops


class _Backward:
  """Which gradients a step computes when some of the parameters train."""

  def __init__(
    self,
    config: ModelConfig,
    every: list[_Parameter],
    trained: Collection[Path] | None,
  ):
    self._config = config
    self._trained = trained
    self._first = min(
      (
        stages.acts(config, layer, parameter.within, parameter.about)
        for parameter in every
        for layer, path in parameter.paths(config).items()
        if self._trains(path)
      ),
      default=None,
    )

  def _trains(self, path: Path) -> bool:
    return self._trained is None or path in self._trained

  def reaches(self, stage: stages.Stage) -> bool:
    """True where the inputs of a stage need a gradient."""
    return self._first is not None and self._first < stage

  def passes(self, parameter: _Parameter, layer: int) -> int:
    """How many products a training step takes for one matrix of a layer.

    Args:
      parameter: that holds it.
      layer: whose slice it is.
    """
    path = parameter.paths(self._config)[layer]
    within, about = parameter.within, parameter.about
    stage = stages.reads(self._config, layer, within, about)
    needs_input = self.reaches(stage)
    if parameter.about.kind is Kind.ADAPTER and path[-1].endswith(NAMES[1]):
      a = path[-1].removesuffix(NAMES[1]) + NAMES[0]
      needs_input |= self._trains((*path[:-1], a))
    return 1 + self._trains(path) + needs_input

  def passes_of_logits(self) -> int:
    """How many products the logits take, which is one forward."""
    tied = self._config.tie_embeddings
    table = ('embed', 'embedding') if tied else ('unembed', 'kernel')
    needs_input = self.reaches(stages.logits(self._config))
    return 1 + self._trains(table) + needs_input
