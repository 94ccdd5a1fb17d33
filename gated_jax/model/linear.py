"""Linear maps: `Kernel` owns a matrix, `project` multiplies by it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.model.low_rank import Adapter
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import normal
from gated_jax.model.parameters import parameter
from gated_jax.model.parameters import with_adapter
from gated_jax.ops.layout import pin_row_major
from gated_jax.sharding import RESIDUAL
from gated_jax.sharding import Axes
from gated_jax.sharding import axis_size
from gated_jax.sharding import is_active
from gated_jax.sharding import is_split
from gated_jax.sharding import per_device


@struct.dataclass
class Matrix:
  """A matrix as its owner stores it, for `project`."""

  value: Float[Array, '...']
  axes: Axes = struct.field(pytree_node=False)
  # How many of its first axes are summed over.
  inputs: int = struct.field(default=1, pytree_node=False)
  bias: Float[Array, '...'] | None = None  # added to the product
  precision: Any = struct.field(default=None, pytree_node=False)
  adapter: Adapter | None = None  # its product is added to the product


@dataclasses.dataclass(frozen=True)
class Making:
  """How a matrix is made and multiplied in other people's models."""

  kernel_init: Any = None  # None: normal, with the layer's standard deviation
  bias_init: Any = None  # None: there is no bias
  precision: Any = None  # precision of jax.lax.dot_general
  boxed: bool = True  # True: parameters carry their axes and their kind


class Kernel(nn.Module):
  """Owns the parameter `kernel`, a matrix, and its `bias` where it has one."""

  shape: tuple[int, ...]  # inputs, then outputs
  axes: Axes
  inputs: int = 1
  init_std: float = 0.02
  param_dtype: Any = 'float32'
  making: Making = Making()
  kind: Kind = Kind.MATRIX

  @nn.compact
  def __call__(self) -> Matrix:
    making, n, dtype = self.making, self.inputs, self.param_dtype
    init = making.kernel_init or normal(self.init_std)
    sides = math.prod(self.shape[:n]), math.prod(self.shape[n:])

    # Variance scaling reads a matrix's two sides off its shape.
    def flat(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
      """Draws with two sides, and reshapes to the parameter's own axes."""
      return jnp.reshape(init(key, sides, dtype), shape)

    axes = self.axes if making.boxed else None
    kinds: dict[str, Any] = {'dtype': dtype, 'inputs': n}
    value, adapter = with_adapter(
      self, 'kernel', self.shape, axes, self.kind, init=flat, **kinds
    )
    bias = None
    if making.bias_init is not None:
      bias = parameter(
        self,
        'bias',
        self.shape[n:],
        axes and axes[n:],
        Kind.BIAS,
        init=making.bias_init,
        dtype=dtype,
      )
    return Matrix(value, self.axes, n, bias, making.precision, adapter)


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
  return per_device(pin_row_major, (axes,), axes)(x)


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


@jax.custom_jvp
def _with_flat_gradient(matrix: Float[Array, 'I O']) -> Float[Array, 'I O']:
  """A matrix whose gradient is a matrix until it is whole, on one device.

  XLA:TPU would give it its axis of heads within the product, for which it turns
  an array of the activations' size until the sequence is innermost. Where there
  are more devices, the gradients' sum over them stands in between.
  """
  return matrix


@_with_flat_gradient.defjvp
def _with_flat_tangent(
  matrices: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  # Of a tangent, because the barrier's transpose is one of the gradient.
  return matrices[0], jax.lax.optimization_barrier(tangents[0])


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
  if kernel.ndim > 2 and not is_split():
    flat_kernel = _with_flat_gradient(flat_kernel)
  flat = x.astype(dtype).reshape(*rows, flat_kernel.shape[0])
  if n > 1:  # the input has heads; otherwise it is the residual stream
    flat = _row_major_output(flat, axes[0], kernel.shape[0])
  sums = (((len(rows),), (0,)), ((), ()))
  y = jax.lax.dot_general(flat, flat_kernel, sums, precision=matrix.precision)
  y = _with_additions(y, flat, matrix)
  y = checkpoint_name(y, name) if name else y
  y = _row_major_output(y, axes[n], kernel.shape[n])
  return y.reshape(*rows, *outputs)


def _with_additions(
  y: Float[Array, '... O'], x: Float[Array, '... I'], matrix: Matrix
) -> Float[Array, '... O']:
  """x W = y, plus the bias and the product of the adapter."""
  if matrix.bias is not None:
    y = y + matrix.bias.astype(y.dtype).reshape(-1)
  if matrix.adapter is not None:
    y = y + matrix.adapter.beside(x, matrix.precision)
  return y


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
  x = x.astype(dtype)
  flat = wide.value.astype(dtype).reshape(x.shape[-1], -1)
  y, other = _two_products(x, flat, narrow.value.astype(dtype))
  y = _with_additions(y, x, wide)
  other = _with_additions(other, x, narrow)
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
