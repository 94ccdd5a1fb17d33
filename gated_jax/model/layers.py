"""Layers that know nothing of attention: linear maps, norms, MLP, embedding.

Modules own parameters, functions compute with them: `Kernel` gives its matrix
and `project` multiplies by it, `Scale` gives a norm's scale and `rms_norm`
applies it. Parameters are stored in one dtype and used in another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.config import ModelConfig
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import normal
from gated_jax.model.parameters import parameter
from gated_jax.ops import embed as ops
from gated_jax.sharding import RESIDUAL
from gated_jax.sharding import Axes
from gated_jax.sharding import axis_size
from gated_jax.sharding import constrain
from gated_jax.sharding import is_active
from gated_jax.sharding import mesh_axes
from gated_jax.sharding import per_device

# What remat policies call the mean square of a norm's input.
MEAN_NAME = 'norm_mean'


@struct.dataclass
class Matrix:
  """A matrix as its owner stores it, for `project`."""

  value: Float[Array, '...']
  axes: Axes = struct.field(pytree_node=False)
  # How many of its first axes are summed over.
  inputs: int = struct.field(default=1, pytree_node=False)


class Kernel(nn.Module):
  """Owns the parameter `kernel`, a matrix."""

  shape: tuple[int, ...]  # inputs, then outputs
  axes: Axes
  inputs: int = 1
  init_std: float = 0.02
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self) -> Matrix:
    value = parameter(
      self,
      'kernel',
      self.shape,
      self.axes,
      Kind.MATRIX,
      init=normal(self.init_std),
      dtype=self.param_dtype,
      inputs=self.inputs,
    )
    return Matrix(value, self.axes, self.inputs)


class Scale(nn.Module):
  """Owns the parameter `scale` of a norm, [D], and gives it in float32."""

  size: int
  zero_centered: bool = False  # stored as its distance from one
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(self) -> Float[Array, ' D']:
    ones = nn.initializers.ones
    scale = parameter(
      self,
      'scale',
      (self.size,),
      (None,),
      Kind.VECTOR,
      init=nn.initializers.zeros if self.zero_centered else ones,
      dtype=self.param_dtype,
    )
    wide = jnp.promote_types(scale.dtype, jnp.float32)
    return scale.astype(wide) + (1 if self.zero_centered else 0)


def rms_norm(
  x: Float[Array, '*b D'], scale: Float[Array, ' D'], eps: float
) -> Float[Array, '*b D']:
  """x / sqrt(mean(x^2) + eps) * scale, over the last axis, in float32.

  From Root Mean Square Layer Normalization (arXiv 1910.07467).
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # One number a token is cheap to save, and recomputing it reads all of x.
  mean = checkpoint_name(jnp.mean(wide * wide, axis=-1), MEAN_NAME)
  inverse = jax.lax.rsqrt(mean + eps)[..., None]
  return (wide * inverse * scale.astype(wide.dtype)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def row_major(x: Float[Array, '...'], axes: Axes) -> Float[Array, '...']:
  """x, and its gradient, in memory row by row where this runs on a TPU.

  XLA:TPU tends to make the sequence axis of a matmul output minor, which suits
  weight gradients. Kernels and scans want row-major arrays and would start with
  a copy.

  Args:
    x: [B, T, M].
    axes: logical names of these axes.
  """

  def pin(x):
    return jax.lax.platform_dependent(
      x,
      tpu=lambda x: with_layout_constraint(x, Layout((0, 1, 2))),
      default=lambda x: x,
    )

  # XLA's partitioner would gather an array under a layout constraint.
  return per_device(pin, (axes,), axes)(x)


row_major.defvjp(
  lambda x, axes: (row_major(x, axes), None),
  lambda axes, _, d: (row_major(d, axes),),
)


def _row_major_output(y: Array, axis: str | None, size: int) -> Array:
  """A matmul's output [B, T, M], row-major while the trainer's mesh is active.

  Args:
    y: the output.
    axis: logical name of the kernel's axis that M begins with.
    size: of that axis.
  """
  if y.ndim != 3 or not is_active():
    return y
  if axis == 'embed':
    return row_major(y, RESIDUAL)
  divides = axis is not None and size % axis_size(axis) == 0
  return row_major(y, ('batch', 'length', axis if divides else None))


def project(
  x: Float[Array, '...'], matrix: Matrix, dtype: Any, name: str = ''
) -> Float[Array, '...']:
  """x times a matrix, over the last axes of x and the first of the matrix.

  Flattened to one 2-D matmul: XLA:TPU lays out arrays with a head axis
  differently from what the attention kernels read.

  Args:
    x: activations whose last `matrix.inputs` axes are summed over.
    matrix: from `Kernel`.
    dtype: of the product.
    name: the output's name for remat policies; '': it has none.
  """
  kernel, axes, n = matrix.value, matrix.axes, matrix.inputs
  dtype = jnp.dtype(dtype)
  rows, outputs = x.shape[: x.ndim - n], kernel.shape[n:]
  flat_kernel = kernel.astype(dtype).reshape(-1, math.prod(outputs))
  flat = x.astype(dtype).reshape(*rows, flat_kernel.shape[0])
  if n > 1:  # the input has heads; otherwise it is the residual stream
    flat = _row_major_output(flat, axes[0], kernel.shape[0])
  y = jax.lax.dot_general(flat, flat_kernel, (((len(rows),), (0,)), ((), ())))
  y = checkpoint_name(y, name) if name else y
  y = _row_major_output(y, axes[n], kernel.shape[n])
  return y.reshape(*rows, *outputs)


def project_both(
  x: Float[Array, 'B T D'],
  wide: Matrix,
  narrow: Matrix,
  dtype: Any,
  name: str = '',
) -> tuple[Float[Array, '...'], Float[Array, 'B T m']]:
  """x times either matrix; one product makes each gradient of both.

  A narrow matrix makes as large a gradient of x as a wide one does. Alone, that
  gradient takes longer to write and to add than to multiply, and the gradient
  of the matrix reads all of x.

  Args:
    x: activations.
    wide, narrow: matrices of one input axis.
    dtype: of the products.
    name: the wide output's name for remat policies.
  """
  dtype = jnp.dtype(dtype)
  flat = wide.value.astype(dtype).reshape(x.shape[-1], -1)
  y, other = _two_products(x.astype(dtype), flat, narrow.value.astype(dtype))
  y = checkpoint_name(y, name) if name else y
  y = _row_major_output(y, wide.axes[1], wide.value.shape[1])
  return y.reshape(*x.shape[:-1], *wide.value.shape[1:]), other


@jax.custom_vjp
def _two_products(
  x: Float[Array, 'B T D'],
  wide: Float[Array, 'D M'],
  narrow: Float[Array, 'D m'],
) -> tuple[Float[Array, 'B T M'], Float[Array, 'B T m']]:
  return x @ wide, x @ narrow


def _two_products_backward(
  saved: tuple[Array, Array, Array], grads: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
  x, *matrices = saved
  d_both = jnp.concatenate(grads, -1)
  d_x = d_both @ jnp.concatenate(matrices, -1).T
  d_matrix = jax.lax.dot_general(x, d_both, (((0, 1), (0, 1)), ((), ())))
  d_wide, d_narrow = jnp.split(d_matrix, [matrices[0].shape[-1]], -1)
  return d_x, d_wide, d_narrow


_two_products.defvjp(
  lambda *arrays: (_two_products(*arrays), arrays), _two_products_backward
)


def norm(
  config: ModelConfig, name: str, x: Float[Array, '*b D']
) -> Float[Array, '*b D']:
  """RMSNorm by a scale that the calling module owns under this name."""
  size, centered = x.shape[-1], config.norm_zero_centered
  scale = Scale(size, centered, config.param_dtype, name=name)
  return rms_norm(x, scale(), config.norm_eps)


class MLP(nn.Module):
  """SwiGLU (arXiv 2002.05202): down(silu(gate_proj x) * up x)."""

  config: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config

    def kernel(name: str, shape: tuple[int, ...], axes: Axes) -> Matrix:
      return Kernel(shape, axes, 1, c.init_std, c.param_dtype, name=name)()

    shape, axes = (c.width, self.width), ('embed', 'mlp')
    gate = project(x, kernel('gate_proj', shape, axes), c.dtype, 'mlp_gate')
    up = project(x, kernel('up', shape, axes), c.dtype, 'mlp_up')
    hidden = constrain(jax.nn.silu(gate) * up, 'batch', 'length', 'mlp')
    return project(hidden, kernel('down', shape[::-1], axes[::-1]), c.dtype)


class Embed(nn.Module):
  """Owns `embedding` [V, D], and looks tokens up in it."""

  config: ModelConfig

  def setup(self) -> None:
    """Makes the table."""
    c = self.config
    self.embedding = parameter(
      self,
      'embedding',
      (c.vocab, c.width),
      ('vocab', 'embed'),
      Kind.EMBEDDING,
      init=normal(c.init_std),
      dtype=c.param_dtype,
    )

  def __call__(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    spec = ops.EmbedSpec(
      dtype=self.config.dtype,
      token_axes=mesh_axes('batch') + mesh_axes('length'),
      vocab_axis=''.join(mesh_axes('vocab')),
      width_axes=mesh_axes('embed'),
    )
    return ops.embed(self.embedding, tokens, spec, _on_each_device)


def _on_each_device(
  function: Callable[..., Any], differentiate: bool
) -> Callable[..., Any]:
  """The lookup on each device's tokens and part of the table."""
  tokens, table = ('batch', 'length'), ('vocab', 'embed')
  rows = (*tokens, None)
  if differentiate:
    return per_device(function, (rows, tokens, table), table)
  return per_device(function, (table, tokens), rows)


class Unembed(nn.Module):
  """Owns `kernel` [D, V]; the loss multiplies by it in chunks."""

  config: ModelConfig

  def setup(self) -> None:
    """Makes the matrix."""
    c = self.config
    self.kernel = parameter(
      self,
      'kernel',
      (c.width, c.vocab),
      ('embed', 'vocab'),
      Kind.EMBEDDING,
      init=normal(c.init_std),
      dtype=c.param_dtype,
    )

  def __call__(self) -> Float[Array, 'D V']:
    return self.kernel
