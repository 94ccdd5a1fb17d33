"""The protocol of layers that mix tokens, and the context they are given.

`gated_jax/model/mixers/__init__.py` is the table of mixers, and
`tests/model/mixer_contract_test.py` says what all of them must hold.
"""

from typing import Any
from typing import ClassVar
from typing import Protocol

from flax import struct
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.ops import rope

# Arrays that a mixer carries from call to call, such as keys and values.
State = Any


@struct.dataclass
class Context:
  """Facts that all layers of one call of a decoder share."""

  # Document of each token; tokens see their own alone. None: a row is one
  # document.
  segments: Int[Array, 'B T'] | None = None
  # Tokens that are not padding, which is at the end of a row; None: all.
  valid: Bool[Array, 'B T'] | None = None
  # Rotations of these tokens, in the order of ModelConfig.rotations.
  rotations: tuple[rope.Rotation, ...] = ()
  # Factors of queries in layers without rotation; None: they have none.
  growth: Float[Array, 'B T'] | None = None
  # How many tokens of each row the states hold already; None without states.
  cache_length: Int[Array, ' B'] | None = None
  # Heads whose gate scores are all below this are left out of attention to a
  # cache; see gated_jax/ops/attention/decode.py.
  skip_below: Float[Array, ''] | None = None
  deterministic: bool = struct.field(default=True, pytree_node=False)

  def rotation(
    self, config: ModelConfig, layer: LayerSpec
  ) -> rope.Rotation | None:
    """The rotation of a layer's queries and keys; None where it has none."""
    if layer.rope is None:
      return None
    at = config.rotations.index((layer.rope, layer.head_dim))
    return self.rotations[at]


class Mixer(Protocol):
  """A linen module that a word of a pattern names.

  It is constructed as `Mixer(config, layer, name=...)`.
  """

  # True where a row may be split over devices. Its parts then come in the order
  # of `gated_jax/ops/attention/context.py`.
  splits_sequence: ClassVar[bool]
  # True where a state passes from token to token and restarts with a document,
  # so that rows have to say where documents begin.
  restarts_by_document: ClassVar[bool]

  def __call__(
    self, x: Float[Array, 'B T D'], ctx: Context, state: State | None
  ) -> tuple[Float[Array, 'B T D'], State | None]:
    """Mixes the tokens of x, and of the state where one is given.

    Args:
      x: normed input.
      ctx: what all layers share.
      state: from `init_state` or an earlier call; None: these are all tokens.

    Returns:
      What is added to the residual stream, and the state that has seen these
      tokens too; padding leaves it as it was.
    """

  @staticmethod
  def init_state(
    config: ModelConfig,
    layer: LayerSpec,
    batch: int,
    length: int,
    dtype: Any,
    stack: tuple[int, ...],
  ) -> State:
    """The state before the first token.

    Args:
      config: of the model.
      layer: which of its layers.
      batch: rows.
      length: tokens that a row may come to hold.
      dtype: that activations are stored in.
      stack: leading axes of a stack of layers; () for one.
    """

  @staticmethod
  def flops(config: ModelConfig, layer: LayerSpec, length: int) -> float:
    """Forward FLOPs per token beyond the layer's matrices.

    Args:
      config: of the model.
      layer: which of its layers.
      length: tokens in a row, taken as one document.
    """
