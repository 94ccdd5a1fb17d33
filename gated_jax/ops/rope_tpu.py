"""Norm and rotation of heads in one pass: a TPU kernel, and its backward.

    n = x / sqrt(mean(x^2) + eps) * scale          y = rotate(n, rotation)

The compiler makes about six passes over memory of this, for it joins neither
the halves of a head nor [B, T, N, H] and [B, T, N H], in which projections
write and attention reads. Here one pass reads [B, T, N H] and writes the
same; what is between lives in registers, in float32. With C = (cos, cos) and
S = (-sin, sin) over a head, and roll by half of it,

    y = n C + roll(n) S          dn = dy C - roll(dy) S

What is rolled is what came in, for norm and scale can be multiplied later: in
bfloat16 the matrix units, which are idle, do that exactly.

`rope.py` has the same in plain arrays.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.rope import Rotation

LANES = 128
# Rows of all heads together that one step of the grid takes: its program is
# unrolled over the heads.
ROWS = 2048
SMALLEST = 16  # rows of bfloat16 that lie in one tile


@dataclasses.dataclass(frozen=True)
class _Call:
  """Static options of one call."""

  heads: int
  rows: int  # of one block
  eps: float
  norm: bool
  interpret: bool


def fits(shape: tuple[int, ...], dtype: jnp.dtype, channels: int) -> bool:
  """Whether the kernel can do this.

  Args:
    shape: of queries or keys, [B, T, N, H].
    dtype: theirs.
    channels: that turn, twice the rotation's last axis.
  """
  _, length, heads, width = shape
  return (
    width == LANES
    and channels == width
    and dtype in (jnp.bfloat16, jnp.float32)
    and _rows(length, heads) >= SMALLEST
  )


def _rows(length: int, heads: int) -> int:
  """A power of two that divides the length."""
  most = 1 << max(ROWS // heads, SMALLEST).bit_length() - 1
  return min(length & -length, most)


def normalize_and_rotate(
  x: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'] | None,
  rotation: Rotation,
  eps: float = 1e-6,
  interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """Queries or keys as attention wants them, where `fits` says so.

  Args:
    x: as projected.
    scale: of the norm; None: no norm.
    rotation: float32.
    eps: of the norm.
    interpret: run without a TPU, slowly.
  """
  b, t, n, h = x.shape
  call = _Call(n, _rows(t, n), eps, scale is not None, interpret)
  ones = jnp.ones(h, jnp.float32)
  scale = ones if scale is None else scale.astype(jnp.float32)
  flat = x.reshape(b, t, n * h)
  return _turn(call, flat, scale[None], *rotation).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(call, x, scale, cos, sin):
  return _run(call, _forward_kernel, [x], scale, (cos, sin), x.dtype)


def _forward(call, x, scale, cos, sin):
  return _turn(call, x, scale, cos, sin), (x, scale, cos, sin)


def _backward(call, saved, dy):
  x, scale, cos, sin = saved
  dx, parts = _run(call, _backward_kernel, [dy, x], scale, (cos, sin), x.dtype)
  d_scale = jnp.sum(parts, axis=(0, 1)).astype(scale.dtype)
  # Positions are integers: nobody asks for a gradient of the rotation.
  return dx, d_scale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_turn.defvjp(_forward, _backward)


def _run(call, kernel, arrays, scale, rotation, dtype):
  """One kernel over blocks of rows, all heads of a row together."""
  b, t, width = arrays[0].shape
  h = width // call.heads
  rows = call.rows

  def block(size):
    return pl.BlockSpec((1, rows, size), lambda b, i: (b, i, 0))

  specs = [block(width)] * len(arrays)
  specs.append(pl.BlockSpec((1, h), lambda b, i: (0, 0)))
  specs += [block(h // 2)] * 2
  backward = kernel is _backward_kernel
  out_specs = [block(width)]
  out_shape = [jax.ShapeDtypeStruct((b, t, width), dtype)]
  if backward:
    # Sums over the rows of each step, for somebody else to add.
    out_specs.append(pl.BlockSpec((1, 1, 1, h), lambda b, i: (b, i, 0, 0)))
    out_shape.append(jax.ShapeDtypeStruct((b, t // rows, 1, h), jnp.float32))
  found = pl.pallas_call(
    functools.partial(kernel, call=call),
    grid=(b, t // rows),
    in_specs=specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel')
    ),
    interpret=call.interpret,
    name='rotate_backward' if backward else 'rotate_forward',
  )(*arrays, scale, *rotation)
  return found if backward else found[0]


def _tables(cos, sin):
  """C and S of the file's docstring, for a block of rows."""
  c, s = cos[0], sin[0]
  return (
    jnp.concatenate([c, c], axis=1),
    jnp.concatenate([-s, s], axis=1),
  )


def _swapping(dtype):
  """A function that lets both halves of a head change places."""
  if dtype != jnp.bfloat16:
    return lambda x: pltpu.roll(x, LANES // 2, 1)
  rows, columns = (
    jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
  )
  ones = (rows ^ (LANES // 2)) == columns
  turned = jnp.where(ones, 1.0, 0.0).astype(dtype)
  return lambda x: jnp.dot(x, turned, preferred_element_type=jnp.float32)


def _forward_kernel(x, scale, cos, sin, y, *, call):
  c, s = _tables(cos, sin)
  swap = _swapping(x.dtype)
  if call.norm:
    c, s = c * scale[...], s * pltpu.roll(scale[...], LANES // 2, 1)
  for head in range(call.heads):
    at = slice(head * LANES, (head + 1) * LANES)
    n = x[0, :, at].astype(jnp.float32)
    turned = n * c + swap(x[0, :, at]) * s
    if call.norm:
      mean = jnp.mean(n * n, axis=1, keepdims=True)
      turned *= jax.lax.rsqrt(mean + call.eps)
    y[0, :, at] = turned.astype(y.dtype)


def _backward_kernel(dy, x, scale, cos, sin, dx, d_scale, *, call):
  c, s = _tables(cos, sin)
  swap = _swapping(dy.dtype)
  total = jnp.zeros(c.shape, jnp.float32)
  for head in range(call.heads):
    at = slice(head * LANES, (head + 1) * LANES)
    d = dy[0, :, at].astype(jnp.float32) * c - swap(dy[0, :, at]) * s
    if call.norm:
      n = x[0, :, at].astype(jnp.float32)
      share = jax.lax.rsqrt(jnp.mean(n * n, axis=1, keepdims=True) + call.eps)
      n = n * share
      product = d * n
      total += product
      d = d * scale[...]
      # d n is product times scale: one array less to keep.
      along = jnp.mean(product * scale[...], axis=1, keepdims=True)
      d = (d - n * along) * share
    dx[0, :, at] = d.astype(dx.dtype)
  d_scale[0, 0] = jnp.sum(total, axis=0, keepdims=True)
