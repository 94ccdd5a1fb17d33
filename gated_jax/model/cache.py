"""The states of a decoder's layers: all that it has seen of each row."""

from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.model.mixers import mixer_named


class Cache(NamedTuple):
  """The states of all layers, and how many tokens of each row they hold."""

  lead: tuple[Any, ...]  # one for each layer of the config's lead
  # One for each layer, or for each word of the pattern a stack of its layers.
  layers: tuple[Any, ...]
  length: Int[Array, ' B']


def init_cache(
  config: ModelConfig, batch: int, length: int, dtype: Any = ''
) -> Cache:
  """An empty cache with room for `length` tokens in each of `batch` rows."""
  kind = jnp.dtype(dtype or config.dtype)

  def state(layer: LayerSpec, *stacked: int) -> Any:
    """The state of a layer, or of a stack of equal ones."""
    init = mixer_named(layer.mixer).init_state
    return init(config, layer, batch, length, kind, stacked)

  lead, rest = (
    config.layers[: len(config.lead)],
    config.layers[len(config.lead) :],
  )
  empty = jnp.zeros(batch, jnp.int32)
  if not config.scan:
    return Cache((), tuple(state(layer) for layer in config.layers), empty)
  repeats = len(rest) // len(config.pattern)
  stacks = rest[: len(config.pattern)]
  return Cache(
    tuple(state(layer) for layer in lead),
    tuple(state(layer, repeats) for layer in stacks),
    empty,
  )
