"""The order in which a forward pass meets its parameters.

Backward goes the same way in reverse, and ends where nothing that trains has
acted: a product needs the gradient of its input only where some parameter that
trains stands before it. Within each layer there are the mixer and then the MLP
or the experts, and within each of them these steps:

    NORM     the norm of the residual stream
    READ     matrices that multiply the normed stream
    REFINE   filters and norms of their products
    CORE     attention, or a memory's products; SwiGLU
    GATED    a gate that acts on what the core gives
    WRITE    the matrix back to the residual stream
    AFTER    norms, gates and shares of what is added to the stream, and the
             matrix that brings the outputs of reduced experts back to it
"""

import enum
from typing import NamedTuple

from gated_jax.config import ModelConfig
from gated_jax.model.parameters import About
from gated_jax.model.parameters import Kind
from gated_jax.model.patterns import Path


class Step(enum.IntEnum):
  """A step within the mixer or the MLP of a layer; see the file."""

  NORM = 0
  READ = 1
  REFINE = 2
  CORE = 3
  GATED = 4
  WRITE = 5
  AFTER = 6


class Stage(NamedTuple):
  """A place in the order: of two, the smaller acts first."""

  layer: int  # -1: the embedding; the depth: what follows the layers
  is_mlp: bool = False  # or of the experts
  step: Step = Step.NORM


EMBEDDING = Stage(-1)
# The names of modules and arrays that write to the residual stream.
WRITERS = frozenset({'out', 'down'})
# The steps at which experts of a reduced width multiply: they read behind a
# matrix that reduces the stream, and write before the one that brings it back.
OF_REDUCED = {
  'gate_proj': Step.CORE,
  'up': Step.CORE,
  'down': Step.WRITE,
  'expand': Step.AFTER,
}
# Of those that act on what a mixer's core gives.
GATES = frozenset({'gate', 'output_gate', 'output_scale'})
# Of those in the experts: a router's weights scale what its experts write back.
FACTORS = {
  'router': Step.GATED,
  'shared_gate': Step.AFTER,
  'input_norm': Step.REFINE,
  'output_norm': Step.WRITE,
}
# Where a gate of attention acts, by its position in the config.
POSITIONS = {
  'sdpa_output': Step.GATED,
  'dense_output': Step.AFTER,
}


def core(layer: int) -> Stage:
  """The stage of a mixer's own products, which no matrix takes part in."""
  return Stage(layer, False, Step.CORE)


def logits(config: ModelConfig) -> Stage:
  """The stage of the product with the table of the vocabulary."""
  return Stage(config.depth, False, Step.WRITE)


def reads(config: ModelConfig, layer: int, within: Path, about: About) -> Stage:
  """The stage whose result a matrix or a filter multiplies.

  Args:
    config: of the model.
    layer: that owns it.
    within: its path below that layer.
    about: facts about it.
  """
  is_mlp = within[0] in ('mlp', 'moe')
  if within[0] == 'moe' and config.moe.reduced_width:
    name = within[1].partition('_lora_')[0]
    if name in OF_REDUCED:
      return Stage(layer, is_mlp, OF_REDUCED[name])
  if _names(within) & WRITERS:
    return Stage(layer, is_mlp, Step.WRITE)
  refines = about.kind is Kind.FILTER
  return Stage(layer, is_mlp, Step.REFINE if refines else Step.READ)


def acts(
  config: ModelConfig, layer: int | None, within: Path, about: About
) -> Stage:
  """The stage at which a parameter takes part in the result.

  Args:
    config: of the model.
    layer: that owns it; None: it lies outside of the layers.
    within: its path below the layer, or its whole path.
    about: facts about it.
  """
  if layer is None:
    if about.kind is Kind.EMBEDDING and within[0] == 'embed':
      return EMBEDDING
    after = Step.WRITE if about.kind is Kind.EMBEDDING else Step.NORM
    return Stage(config.depth, False, after)
  block = within[0]
  if block.endswith('_norm'):
    after = Step.AFTER if block.endswith('_post_norm') else Step.NORM
    return Stage(layer, block.startswith('mlp_'), after)
  if block.endswith('_shares'):
    return Stage(layer, block.startswith('mlp_'), Step.AFTER)
  stage = reads(config, layer, within, about)
  names = _names(within)
  if stage.step is not Step.READ:
    return stage
  if within[:2] == ('moe', 'router') and config.moe.output_norm:
    return stage._replace(step=Step.WRITE)  # its weights come behind the norm
  if stage.is_mlp:
    return stage._replace(step=FACTORS.get(within[1], stage.step))
  if names & GATES:
    of_attention = block == 'attention'
    position = config.gate.position if of_attention else 'sdpa_output'
    return stage._replace(step=POSITIONS.get(position, Step.READ))
  matrix = about.kind in (Kind.MATRIX, Kind.GATE, Kind.ADAPTER, Kind.BIAS)
  return stage if matrix else stage._replace(step=Step.REFINE)


def _names(within: Path) -> set[str]:
  """Names of the modules around a parameter, and of what it adapts."""
  return {name.partition('_lora_')[0] for name in within}
