"""Parameters that say what they are where they are made.

The box around a parameter carries its logical axes (`gated_jax/sharding.py`
places it by them) and its kind. The optimizer, the count of FLOPs and the
casts of decoding read the kind off the box, so that a new layer needs no row in
any of them.
"""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta
from jaxtyping import Array

from gated_jax.config import LoraConfig
from gated_jax.config import ModelConfig
from gated_jax.model.low_rank import NAMES
from gated_jax.model.low_rank import Adapter
from gated_jax.model.patterns import chosen
from gated_jax.sharding import Axes


class Kind(enum.Enum):
  """The purpose of a parameter; it decides updates, casts and counts."""

  MATRIX = 'matrix'  # multiplies activations
  EMBEDDING = 'embedding'  # one row for each token of the vocabulary
  VECTOR = 'vector'  # the scale of a norm
  FILTER = 'filter'  # weighs the last few inputs of each channel
  BIAS = 'bias'  # added to activations
  GATE = 'gate'  # the matrix that makes gate logits
  GATE_SCORES = 'gate_scores'  # gate logits that are the same for every token
  ROUTER = 'router'  # the matrix that scores experts
  LOAD_BIAS = 'load_bias'  # chooses experts; its gradient is the excess load
  DECAY = 'decay'  # how fast a recurrent state forgets
  ADAPTER = 'adapter'  # one of two thin matrices whose product is added


# Computed with in float32 as they are stored, whatever the model's dtype.
FLOAT32 = frozenset({Kind.VECTOR, Kind.ROUTER, Kind.LOAD_BIAS, Kind.DECAY})
# Matrices that may have an adapter.
ADAPTED = frozenset({Kind.MATRIX, Kind.GATE})
# Multiplied by activations: these cost FLOPs for every token.
MULTIPLIED = frozenset(
  {Kind.MATRIX, Kind.GATE, Kind.ROUTER, Kind.FILTER, Kind.ADAPTER}
)


@dataclasses.dataclass(frozen=True)
class About:
  """Facts about a parameter that its array does not show.

  Attributes:
    kind: what it does.
    axes: logical names of its axes, those of a stack of layers included.
    inputs, outputs: of its last axes, how many are summed over and how many
      remain; what comes before them (layers, experts) is a stack of matrices.
  """

  kind: Kind
  axes: Axes
  inputs: int = 0
  outputs: int = 0

  @property
  def of_experts(self) -> bool:
    """True for a stack with a matrix for each expert."""
    return 'experts' in self.axes


class Box(nn.LogicallyPartitioned):
  """A parameter with its logical axes, its kind, and the sides of a matrix."""

  kind: Kind = struct.field(default=Kind.MATRIX, pytree_node=False)
  inputs: int = struct.field(default=0, pytree_node=False)
  outputs: int = struct.field(default=0, pytree_node=False)

  @property
  def about(self) -> About:
    """Everything but the array."""
    return About(self.kind, self.names, self.inputs, self.outputs)


def parameter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: Axes | None,
  kind: Kind,
  *,
  init: Any,
  dtype: Any = 'float32',
  inputs: int = 0,
) -> Array:
  """A parameter of `module`; the sum, where it is a matrix with an adapter.

  Args:
    module: its owner.
    name: in the owner.
    shape: of the array.
    axes: logical name of each axis; None: a plain array, in no box.
    kind: what it does.
    init: a Flax initialiser.
    dtype: it is stored in.
    inputs: of a matrix, how many of its last axes are summed over; the others
      after them are outputs. 0 for what is no matrix.
  """
  value, adapter = with_adapter(
    module, name, shape, axes, kind, init=init, dtype=dtype, inputs=inputs
  )
  return value if adapter is None else adapter.added_to(value)


def with_adapter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: Axes | None,
  kind: Kind,
  *,
  init: Any,
  dtype: Any = 'float32',
  inputs: int = 0,
) -> tuple[Array, Adapter | None]:
  """A parameter as `parameter` makes it, and apart from it its adapter."""
  if axes is None:
    plain: Any = module.param(name, init, shape, jnp.dtype(dtype))
    return plain, None
  # Experts are a stack of matrices; every other axis after the inputs remains.
  outputs = len(axes) - inputs - axes.count('experts') if inputs else 0

  def boxed(key: Array, *args: Any) -> Box:
    """The array, in a box that says what it is."""
    return Box(
      init(key, *args), axes, kind=kind, inputs=inputs, outputs=outputs
    )

  # param() takes it out of its box.
  value: Any = module.param(name, boxed, shape, jnp.dtype(dtype))
  lora = _lora_of(module)
  path = (*(module.scope.path if module.scope else ()), name)
  if inputs and lora.rank and kind in ADAPTED and chosen(lora.matrices, path):
    return value, _adapter(module, name, value.shape, axes, inputs, lora)
  return value, None


def _lora_of(module: nn.Module) -> LoraConfig:
  """The adapters that the decoder around a module asks for.

  The owners of matrices need not know of adapters, so the settings are read off
  the nearest module that has a decoder's.
  """
  owner: Any = module
  while isinstance(owner, nn.Module):
    config = getattr(owner, 'config', None)
    if isinstance(config, ModelConfig):
      return config.lora
    owner = owner.parent
  return LoraConfig()


def _adapter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: Axes,
  inputs: int,
  lora: LoraConfig,
) -> Adapter:
  """The adapter of a matrix, two parameters of the same module.

  Args:
    module: its owner.
    name: of the matrix.
    shape: of the matrix.
    axes: logical name of each of its axes.
    inputs: how many of them are summed over.
    lora: settings of the adapter.
  """
  first = axes.count('experts')
  last, rank = first + inputs, lora.rank
  # PyTorch's bounds of a linear layer, as LoRA was published with.
  bound = math.prod(shape[first:last]) ** -0.5

  def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws A."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  a = parameter(
    module,
    name + NAMES[0],
    (*shape[:last], rank),
    (*axes[:last], None),
    Kind.ADAPTER,
    init=uniform,
  )
  b = parameter(
    module,
    name + NAMES[1],
    (*shape[:first], rank, *shape[last:]),
    (*axes[:first], None, *axes[last:]),
    Kind.ADAPTER,
    init=nn.initializers.zeros,  # the first step is the base's
  )
  # Matrices of experts are a stack, whose adapter is added and not applied.
  if not lora.dropout or first:
    return Adapter(a, b, lora.scale, inputs)
  key = module.make_rng('dropout')
  return Adapter(a, b, lora.scale, inputs, lora.dropout, key)


def normal(std: float) -> Any:
  """The initialiser of every matrix; a std of 0 gives zeros."""
  return nn.initializers.normal(std) if std else nn.initializers.zeros


def is_box(x: Any) -> bool:
  """True at a parameter in its box, where a tree of boxes ends."""
  return isinstance(x, meta.AxisMetadata)


def about(boxed: Any) -> dict[tuple[str, ...], About]:
  """Path to facts, for every parameter of a tree of boxes.

  Args:
    boxed: `model.init(...)['params']`, abstract or not, not unboxed.

  Raises:
    ValueError: a parameter does not say what it is.
  """
  facts = {}
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  for path, leaf in leaves:
    names = tuple(str(part.key) for part in path)
    if not isinstance(leaf, Box):
      raise ValueError(
        f'the parameter {"/".join(names)} does not say what it is: make it '
        'with gated_jax.model.parameters.parameter'
      )
    facts[names] = leaf.about
  return facts
