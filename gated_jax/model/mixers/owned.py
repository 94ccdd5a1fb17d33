"""The parameters of an attention layer, owned by the module that calls."""

from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.model.gate import Gate
from gated_jax.model.layers import Scale
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import Matrix
from gated_jax.model.mixers.attend import AttentionLayer


def kernel(
  layer: AttentionLayer,
  name: str,
  shape: tuple[int, ...],
  axes: sharding.Axes,
  inputs: int = 1,
) -> Matrix:
  """A projection's matrix, owned by the calling module under this name."""
  making = layer.making_out if name == 'out' else layer.making
  kinds = (layer.init_std, layer.param_dtype, making)
  return Kernel(shape, axes, inputs, *kinds, name=name)()


def gate_matrix(
  layer: AttentionLayer,
  x: Float[Array, 'B T D'],
  shape: tuple[int, ...],
  axes: sharding.Axes,
) -> Matrix:
  """The gate's matrix, owned by the calling module as `gate`."""
  kinds = (layer.param_dtype, layer.making.boxed)
  return Gate(layer.gate, x.shape[-1], shape, axes, *kinds, name='gate')()


def head_scale(layer: AttentionLayer, name: str) -> Float[Array, ' H']:
  """The scale of a norm over each head, owned by the calling module."""
  kinds = (layer.norm_zero_centered, layer.param_dtype, layer.making.boxed)
  return Scale(layer.head_dim, *kinds, name=name)()
