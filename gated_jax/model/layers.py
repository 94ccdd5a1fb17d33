"""Layers that know nothing of attention: linear maps, norms, MLP, embedding.

Every parameter carries the logical axes that `gated_jax/sharding.py` places
it by. Parameters are kept in one dtype and used in another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.config import ModelConfig
from gated_jax.ops import embed as ops
from gated_jax.sharding import RESIDUAL
from gated_jax.sharding import Axes
from gated_jax.sharding import axis_size
from gated_jax.sharding import constrain
from gated_jax.sharding import mesh_axes
from gated_jax.sharding import per_device

# Of a norm's squares, known to remat policies by this name.
MEAN_NAME = 'norm_mean'


def parameter(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: Axes,
  *,
  init: Any,
  dtype: Any = 'float32',
) -> Array:
  """A parameter of `module` that knows its logical axes."""
  boxed = nn.with_logical_partitioning(init, axes)
  value: Any = module.param(name, boxed, shape, jnp.dtype(dtype))
  return value  # param() takes it out of its box


def normal(std: float) -> Any:
  """The initialiser of every matrix; a std of 0 gives zeros."""
  return nn.initializers.normal(std) if std else nn.initializers.zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def row_major(x: Float[Array, '...'], axes: Axes) -> Float[Array, '...']:
  """x, and its gradient, in memory row by row where this runs on a TPU.

  Its compiler likes to lay products out with positions innermost, for the sake
  of those that sum over positions. Kernels, scans and whatever works on rows
  then begin with a copy.

  Args:
    x: [B, T, M]; any other shape stays as it is.
    axes: what these are called.
  """
  if x.ndim != 3:
    return x

  def pin(x):
    return jax.lax.platform_dependent(
      x,
      tpu=lambda x: with_layout_constraint(x, Layout((0, 1, 2))),
      default=lambda x: x,
    )

  # The partitioner would gather what such a constraint is about.
  return per_device(pin, (axes,), axes)(x)


row_major.defvjp(
  lambda x, axes: (row_major(x, axes), None),
  lambda axes, _, d: (row_major(d, axes),),
)


def project(
  x: Float[Array, '...'],
  kernel: Float[Array, '...'],
  axes: Axes,
  dtype: Any,
  n: int = 1,
  name: str = '',
) -> Float[Array, '...']:
  """x times kernel, over the last n axes of x and the first n of kernel.

  As a product of matrices, whatever axes there are: TPU compilers lay arrays
  with heads in them out in other ways than kernels read them.

  Args:
    x: what is projected.
    kernel: its matrix.
    axes: what the kernel's are called.
    dtype: of the product.
    n: axes that are summed over.
    name: of the result, for remat policies; '': none.
  """
  dtype = jnp.dtype(dtype)
  rows, outputs = x.shape[: x.ndim - n], kernel.shape[n:]
  matrix = kernel.astype(dtype).reshape(-1, math.prod(outputs))
  flat = x.astype(dtype).reshape(*rows, matrix.shape[0])
  if n > 1:  # heads, from a kernel and to one
    flat = row_major(flat, _activation(axes[0], kernel.shape[0]))
  y = jax.lax.dot_general(flat, matrix, (((len(rows),), (0,)), ((), ())))
  y = checkpoint_name(y, name) if name else y
  y = row_major(y, _activation(axes[n], kernel.shape[n]))
  return y.reshape(*rows, *outputs)


def _activation(name: str | None, size: int) -> Axes:
  """What an activation's axes are called that ends in this one of a kernel."""
  if name == 'embed':
    return RESIDUAL
  divides = name is not None and size % axis_size(name) == 0
  return 'batch', 'length', name if divides else None


@jax.custom_vjp
def project_both(
  x: Float[Array, 'B T D'],
  wide: Float[Array, 'D M'],
  narrow: Float[Array, 'D m'],
) -> tuple[Float[Array, 'B T M'], Float[Array, 'B T m']]:
  """x times either matrix; one product makes each gradient of both.

  A narrow matrix makes as large a gradient of x as a wide one does. By itself
  it takes longer to write and to add than to multiply; and for the gradient of
  the matrix, all of x is read.
  """
  return x @ wide, x @ narrow


def _project_both_backward(saved, grads):
  x, *matrices = saved
  d_both = jnp.concatenate(grads, -1)
  d_x = d_both @ jnp.concatenate(matrices, -1).T
  d_matrix = jax.lax.dot_general(x, d_both, (((0, 1), (0, 1)), ((), ())))
  return d_x, *jnp.split(d_matrix, [matrices[0].shape[-1]], -1)


project_both.defvjp(
  lambda *arrays: (project_both(*arrays), arrays), _project_both_backward
)


class Linear(nn.Module):
  """x times `kernel`, over the last `inputs` axes of x; no bias."""

  shape: tuple[int, ...]  # of the kernel: inputs, then outputs
  axes: Axes
  inputs: int = 1
  save_as: str = ''  # the result's name for remat policies
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, '...'], beside: Float[Array, 'D m'] | None = None
  ) -> Any:
    """The product, or the pair of it and x times `beside`: see project_both."""
    kernel = parameter(
      self,
      'kernel',
      self.shape,
      self.axes,
      init=normal(self.init_std),
      dtype=self.param_dtype,
    )
    if beside is None:
      return project(
        x, kernel, self.axes, self.dtype, self.inputs, self.save_as
      )
    dtype = jnp.dtype(self.dtype)
    matrix = kernel.astype(dtype).reshape(x.shape[-1], -1)
    y, other = project_both(x.astype(dtype), matrix, beside.astype(dtype))
    y = checkpoint_name(y, self.save_as)
    y = row_major(y, _activation(self.axes[1], kernel.shape[1]))
    return y.reshape(*x.shape[:-1], *kernel.shape[1:]), other


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, over the last axis, in float32."""

  eps: float = 1e-6
  zero_centered: bool = False  # what is stored is scale - 1
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, '*b D'],
    apply: Callable[[Array, Array], Array] | None = None,
  ) -> Float[Array, '*b D']:
    """The norm of x, or what `apply` makes of x and the scale in its place."""
    ones = nn.initializers.ones
    scale = parameter(
      self,
      'scale',
      x.shape[-1:],
      (None,),
      init=nn.initializers.zeros if self.zero_centered else ones,
      dtype=self.param_dtype,
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = scale.astype(wide.dtype) + (1 if self.zero_centered else 0)
    if apply is not None:
      return apply(x, scale)
    # One number a token is cheap to keep and takes a pass over x to find.
    mean = checkpoint_name(jnp.mean(wide * wide, axis=-1), MEAN_NAME)
    share = jax.lax.rsqrt(mean + self.eps)[..., None]
    return (wide * share * scale).astype(x.dtype)


def norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
  """The config's norm."""
  return RMSNorm(
    config.norm_eps,
    config.norm_zero_centered,
    config.param_dtype,
    name=name,
  )


class MLP(nn.Module):
  """SwiGLU: down(silu(gate_proj x) * up x)."""

  config: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config

    def linear(name, sizes, axes, save_as=''):
      return Linear(
        sizes,
        axes,
        save_as=save_as,
        init_std=c.init_std,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        name=name,
      )

    into, axes = (c.width, self.width), ('embed', 'mlp')
    gate = linear('gate_proj', into, axes, 'mlp_gate')(x)
    up = linear('up', into, axes, 'mlp_up')(x)
    hidden = constrain(jax.nn.silu(gate) * up, 'batch', 'length', 'mlp')
    return linear('down', into[::-1], axes[::-1])(hidden)


class Embed(nn.Module):
  """A row of `embedding` [V, D] for each token."""

  config: ModelConfig

  def setup(self):
    c = self.config
    self.embedding = parameter(
      self,
      'embedding',
      (c.vocab, c.width),
      ('vocab', 'embed'),
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
    return ops.embed(self.embedding, tokens, spec, _place)


def _place(function: Any, differentiate: bool) -> Any:
  """The lookup on each device's tokens and part of the table."""
  tokens, table = ('batch', 'length'), ('vocab', 'embed')
  rows = (*tokens, None)
  if differentiate:
    return per_device(function, (rows, tokens, table), table)
  return per_device(function, (table, tokens), rows)


class Unembed(nn.Module):
  """`kernel` [D, V]: only the matrix, for the loss multiplies in chunks."""

  config: ModelConfig

  def setup(self):
    c = self.config
    self.kernel = parameter(
      self,
      'kernel',
      (c.width, c.vocab),
      ('embed', 'vocab'),
      init=normal(c.init_std),
      dtype=c.param_dtype,
    )

  def __call__(self) -> Float[Array, 'D V']:
    return self.kernel
