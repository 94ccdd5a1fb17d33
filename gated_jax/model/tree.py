"""The place of each layer in the tree of parameters, states and probes.

unscanned            layers_0, layers_1, ...
scanned, one word    layers: every array stacked along its first axis
scanned, a pattern   layers/block_0, layers/block_1, ...: the same for each
                     word of the pattern
scanned, a lead      lead_0, lead_1, ... before them
"""

import collections
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from gated_jax.config import ModelConfig


class Address(NamedTuple):
  """A layer's subtree, and its place along the axis of stacked layers."""

  path: tuple[str, ...]
  place: int | None = None


def address(config: ModelConfig, layer: int) -> Address:
  """The place of a layer."""
  if not config.scan:
    return Address((f'layers_{layer}',))
  repeated = layer - len(config.lead)
  if repeated < 0:
    return Address((f'lead_{layer}',))
  period = len(config.pattern)
  if period == 1:
    return Address(('layers',), repeated)
  return Address(('layers', f'block_{repeated % period}'), repeated // period)


def layer_of(config: ModelConfig, path: tuple[str, ...]) -> int | None:
  """The first layer whose subtree holds a path; None: it is in no layer."""
  for layer in range(config.depth):
    place = address(config, layer).path
    if path[: len(place)] == place:
      return layer
  return None


def subtree(tree: Mapping[str, Any], config: ModelConfig, layer: int) -> Any:
  """One layer's part of a tree, taken out of its stack; {} if there is none."""
  at = address(config, layer)
  for name in at.path:
    if name not in tree:
      return {}
    tree = tree[name]
  if at.place is None:
    return tree
  return jax.tree.map(lambda x: x[at.place], tree)


def unstack(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters as an unscanned model of the same layers holds them."""
  places = {address(config, i).path[0] for i in range(config.depth)}
  outside = {name: x for name, x in params.items() if name not in places}
  layers = {
    f'layers_{i}': subtree(params, config, i) for i in range(config.depth)
  }
  return outside | layers


def stack(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of an unscanned model as a scanned one holds them."""
  flat: dict[tuple[str, ...], Any] = {}
  stacks = collections.defaultdict(list)
  flat_params = traverse_util.flatten_dict(params)
  layers: dict[int, dict[tuple[str, ...], Any]] = collections.defaultdict(dict)
  for path, x in flat_params.items():
    head, _, number = path[0].partition('layers_')
    if head or not number.isdigit():
      flat[path] = x
    else:
      layers[int(number)][path[1:]] = x
  for layer in sorted(layers):
    at = address(config, layer)
    for path, x in layers[layer].items():
      if at.place is None:
        flat[(*at.path, *path)] = x
      else:
        stacks[(*at.path, *path)].append(x)
  flat |= {path: jnp.stack(arrays) for path, arrays in stacks.items()}
  return traverse_util.unflatten_dict(flat)
