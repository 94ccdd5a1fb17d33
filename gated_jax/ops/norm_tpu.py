"""The norm that a block reads the residual stream through: TPU kernels.

    h = x r scale,   r = 1 / sqrt(mean(x^2) + eps)

Forward's kernel makes mean(x^2) alone, as products make h where they read it.
It reads the stream where it is saved, which XLA would do only after it has
copied it. With dh, and what else comes to x, which is the gradient of the
stream after the block,

    dx = d_stream + r (dh scale - x r^2 mean(dh scale x))

Of which XLA makes three passes, two of them in products that then wait for the
vector unit. Here one kernel reads x, dh and d_stream once and writes dx.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.tpu_rows import SMALLEST
from gated_jax.ops.tpu_rows import rows_of_block

# Elements of one array that one step of the grid takes.
ELEMENTS = 1 << 19


class Gradients(NamedTuple):
  """Of the stream, and of the scale by parts that are to be summed."""

  x: Float[Array, 'B T D']
  scale: Float[Array, 'B P D']


def fits(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
  """True where the kernel can do this.

  Args:
    shape: [B, T, D] of the stream on a device.
    dtype: the stream's.
  """
  _, length, width = shape
  whole = not width % LANES and not length % LANES
  return whole and dtype in (jnp.bfloat16, jnp.float32)


def mean_square(
  x: Float[Array, 'B T D'], interpret: bool = False
) -> Float[Array, 'B T']:
  """The mean of the squares of each token, float32, where `fits` allows it.

  Args:
    x: the stream.
    interpret: run without a TPU, slowly.
  """
  b, t, width = x.shape
  rows = max(rows_of_block(t, ELEMENTS // width), LANES)
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    means = pl.pallas_call(
      _mean_kernel,
      grid=(b, t // rows),
      in_specs=[pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0))],
      out_specs=pl.BlockSpec((1, 1, rows), lambda b, i: (b, 0, i)),
      out_shape=jax.ShapeDtypeStruct((b, 1, t), jnp.float32),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel')
      ),
      interpret=interpret,
      name='norm_mean_square',
    )(x)
  return means[:, 0]


def _mean_kernel(x: Any, means: Any) -> None:
  """Writes the means of a block of rows side by side."""
  _, rows, width = x.shape

  def strip(i: Array, nothing: None) -> None:
    """As many rows as there are lanes for their means."""
    at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
    squares = jnp.zeros((LANES, LANES), jnp.float32)
    for c in range(0, width, LANES):
      n = x[0, at, c : c + LANES].astype(jnp.float32)
      squares += n * n
    means[0, :, at] = jnp.sum(squares.T, axis=0, keepdims=True) / width
    return nothing

  jax.lax.fori_loop(0, rows // LANES, strip, None)


def backward(
  x: Float[Array, 'B T D'],
  d_h: Float[Array, 'B T D'],
  d_stream: Float[Array, 'B T D'],
  scale: Float[Array, ' D'],
  eps: float,
  interpret: bool = False,
) -> Gradients:
  """Gradients of x and scale, where `fits` allows it.

  Args:
    x: the stream.
    d_h: gradient of what was read of it.
    d_stream: gradient of the stream by all else.
    scale: the norm's.
    eps: the norm's.
    interpret: run without a TPU, slowly.
  """
  b, t, width = x.shape
  rows = rows_of_block(t, ELEMENTS // width)
  block = pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0))
  row = pl.BlockSpec((1, width), lambda b, i: (0, 0))
  part = pl.BlockSpec((1, 1, 1, width), lambda b, i: (b, i, 0, 0))
  steps = t // rows
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    dx, parts = pl.pallas_call(
      functools.partial(_kernel, eps=eps),
      grid=(b, steps),
      in_specs=[block, block, block, row],
      out_specs=[block, part],
      out_shape=[
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((b, steps, 1, width), jnp.float32),
      ],
      scratch_shapes=[pltpu.VMEM((SMALLEST, width), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel')
      ),
      interpret=interpret,
      name='norm_backward',
    )(x, d_h, d_stream, scale.astype(jnp.float32)[None])
  return Gradients(dx, parts[:, :, 0])


def _kernel(
  x: Any,
  d_h: Any,
  d_stream: Any,
  scale: Any,
  dx: Any,
  d_scale: Any,
  sums: Any,
  *,
  eps: float,
) -> None:
  """Writes dx for a block of rows, and its share of the scale's gradient."""
  _, rows, width = x.shape
  columns = [slice(c, c + LANES) for c in range(0, width, LANES)]
  sums[...] = jnp.zeros(sums.shape, jnp.float32)

  def strip(i: Array, nothing: None) -> None:
    """So few rows that all that is kept of them lies in registers."""
    at = pl.ds(pl.multiple_of(i * SMALLEST, SMALLEST), SMALLEST)
    squares = along = jnp.zeros((SMALLEST, LANES), jnp.float32)
    for c in columns:
      n = x[0, at, c].astype(jnp.float32)
      squares += n * n
      along += n * (d_h[0, at, c].astype(jnp.float32) * scale[:, c])
    mean, along = (
      jnp.sum(a, axis=1, keepdims=True) / width for a in (squares, along)
    )
    inverse = jax.lax.rsqrt(mean + eps)
    along *= inverse * inverse * inverse
    for c in columns:
      n = x[0, at, c].astype(jnp.float32)
      d = d_h[0, at, c].astype(jnp.float32) * inverse
      sums[:, c] += d * n
      total = d_stream[0, at, c].astype(jnp.float32) + d * scale[:, c]
      dx[0, at, c] = (total - n * along).astype(dx.dtype)
    return nothing

  jax.lax.fori_loop(0, rows // SMALLEST, strip, None)
  d_scale[0, 0] = jnp.sum(sums[...], axis=0, keepdims=True)
