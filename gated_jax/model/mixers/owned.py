"""The parameters of an attention layer, owned by the module that calls."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.model.gate import Gate
from gated_jax.model.layers import Scale
from gated_jax.model.layers import rms_norm
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import Matrix
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.ops.exclusive import without_own_value


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


def head_scale(
  layer: AttentionLayer, name: str, size: int = 0
) -> Float[Array, ' H']:
  """The scale of a norm, owned by the calling module; 0: over each head."""
  kinds = (layer.norm_zero_centered, layer.param_dtype, layer.making.boxed)
  return Scale(size or layer.head_dim, *kinds, name=name)()


def norm_scale(
  layer: AttentionLayer, name: str, factor: float = 1.0
) -> Array | None:
  """The scale of heads' RMSNorm times a factor, which is free there.

  Args:
    layer: its sizes and kinds.
    name: of the norm.
    factor: of what the norm gives.

  Returns:
    [H], or that of all heads, [N H]; None where heads are not normed.
  """
  if not layer.qk_norm:
    return None
  size = layer.head_dim
  if layer.qk_norm_joint:
    size *= layer.heads if name == 'query_norm' else layer.kv_heads
  owns = layer.qk_norm_scale
  scale = head_scale(layer, name, size) if owns else jnp.ones(size)
  return scale if factor == 1 else scale * factor


def in_place_of_a_gate(
  layer: AttentionLayer,
  output: Float[Array, 'B T N H'],
  value: Float[Array, 'B T K H'],
) -> Float[Array, 'B T N H']:
  """The outputs of heads through what the paper, or others, compare gates with.

  Args:
    layer: its gate's `kind` says which; a gate itself changes nothing here.
    output: of the heads.
    value: of the same tokens.
  """
  if layer.gate.kind == 'rms_norm':
    return rms_norm(output, head_scale(layer, 'output_norm'), layer.norm_eps)
  if layer.gate.kind == 'silu':
    return jax.nn.silu(output)
  if layer.gate.kind == 'exclusive':
    return without_own_value(output, value)
  return output
