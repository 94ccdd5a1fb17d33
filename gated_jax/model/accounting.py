"""How many parameters a model has, and how many FLOPs a token costs it.

Both are sums over the parameters that the model makes, each of which says what
it is (`parameters.py`), and over what its mixers compute beside their matrices.
Nothing is allocated.
"""

import dataclasses
import math
from typing import Any

import jax
from flax.core import meta

from gated_jax.config import ModelConfig
from gated_jax.model import parameters as kinds
from gated_jax.model import tree
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.mixers import mixer_named
from gated_jax.model.parameters import Kind

# The backward pass of a product takes two products of the same size.
PASSES = 3


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """One array of a model: its part in the sums, and its numbers.

  Attributes:
    part: embed, unembed, norms, gate, router, experts, mlp, adapters, or a
      mixer's word.
    size: of the array.
    active: how many of them one token uses; of experts those that it chooses.
    multiplied: whether a token is multiplied by those.
  """

  part: str
  size: int
  active: int
  multiplied: bool


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
  boxed = boxed_parameters(config)
  facts = kinds.about(boxed)
  shapes: Any = jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))
  result = []
  for path, leaf in shapes:
    names = tuple(str(part.key) for part in path)
    about, size = facts[names], math.prod(leaf.shape)
    active = size
    if about.of_experts:
      active = size * config.moe.top_k // config.moe.experts
    multiplied = about.kind in kinds.MULTIPLIED
    part = _part(config, names, about)
    result.append(_Parameter(part, size, active, multiplied))
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


def flops_per_token(config: ModelConfig, length: int) -> dict[str, float]:
  """FLOPs to train on one token, by part: forward, and twice that backward.

  Products of matrices alone, two FLOPs for each multiplication, and only what
  the mathematics needs: keys that causality and windows leave visible, experts
  that are chosen, nothing recomputed. Rows are taken as one document; shorter
  ones cost less attention.

  Args:
    config: of the model.
    length: tokens in a row.

  Returns:
    FLOPs of each part; a mixer's matrices are its `_projections`.
  """
  flops: dict[str, float] = {}

  def add(part: str, forward: float) -> None:
    """Counts a part's forward pass, and backward with it."""
    flops[part] = flops.get(part, 0.0) + PASSES * forward

  mixers = {layer.mixer for layer in config.layers}
  for parameter in _all(config):
    if parameter.multiplied:
      part = parameter.part
      part += '_projections' if part in mixers else ''
      add(part, 2.0 * parameter.active)
  add('logits', 2.0 * config.vocab * config.width)
  for layer in config.layers:
    add(layer.mixer, mixer_named(layer.mixer).flops(config, layer, length))
  return flops
