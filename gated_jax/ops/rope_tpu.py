"""Norm and rotation of heads in one pass: a TPU kernel, and its backward.

    n = x / sqrt(mean(x^2) + eps) * scale          y = rotate(n, rotation)

XLA makes about six passes over memory of this, because it fuses neither the two
halves of a head nor [B, T, N, H] with [B, T, N H], in which projections write
and attention reads. Here one pass reads [B, T, N H] and writes the same, and
everything between lives in registers, in float32. With C = (cos, cos) and
S = (-sin, sin) over a head, and roll by half of it,

    y = n C + roll(n) S          dn = dy C - roll(dy) S

The kernel rolls its input and multiplies by norm and scale afterwards: in
bfloat16 the matrix units, which are idle, can then roll exactly.

`rope.py` has the same in plain arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.rope import Rotation
from gated_jax.ops.tpu_rows import SMALLEST
from gated_jax.ops.tpu_rows import rows_of_block

# Rows of all heads together that one step of the grid takes: its program is
# unrolled over the heads.
ROWS = 2048


@dataclasses.dataclass(frozen=True)
class _KernelSpec:
  """Static options of one call."""

  heads: int
  rows: int  # number of rows of a block
  eps: float
  norm: bool
  interpret: bool


def fits(shape: tuple[int, ...], dtype: jnp.dtype, channels: int) -> bool:
  """True where the kernel can do this.

  Args:
    shape: [B, T, N, H] of queries or keys.
    dtype: their dtype.
    channels: how many of a head's channels are rotated, twice the last axis of
      the rotation.
  """
  _, length, heads, width = shape
  return (
    width == LANES
    and channels == width
    and dtype in (jnp.bfloat16, jnp.float32)
    and _rows(length, heads) >= SMALLEST
  )


def _rows(length: int, heads: int) -> int:
  """Rows of a block, all heads of a row together."""
  return rows_of_block(length, ROWS // heads)


def normalize_and_rotate(
  x: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'] | None,
  rotation: Rotation,
  eps: float = 1e-6,
  interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """Queries or keys as attention wants them, where `fits` allows it.

  Args:
    x: queries or keys as projected.
    scale: the norm's; None: there is no norm.
    rotation: float32.
    eps: the norm's.
    interpret: run without a TPU, slowly.
  """
  b, t, n, h = x.shape
  spec = _KernelSpec(n, _rows(t, n), eps, scale is not None, interpret)
  ones = jnp.ones(h, jnp.float32)
  scale = ones if scale is None else scale.astype(jnp.float32)
  flat = x.reshape(b, t, n * h)
  return _rotate(spec, flat, scale[None], *rotation).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(
  spec: _KernelSpec, x: Array, scale: Array, cos: Array, sin: Array
) -> Array:
  return _run(spec, _forward_kernel, [x], scale, (cos, sin), x.dtype)[0]


def _forward(
  spec: _KernelSpec, x: Array, scale: Array, cos: Array, sin: Array
) -> tuple[Array, tuple[Array, ...]]:
  return _rotate(spec, x, scale, cos, sin), (x, scale, cos, sin)


def _backward(
  spec: _KernelSpec, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, ...]:
  x, scale, cos, sin = saved
  dx, parts = _run(spec, _backward_kernel, [dy, x], scale, (cos, sin), x.dtype)
  d_scale = jnp.sum(parts, axis=(0, 1)).astype(scale.dtype)
  # Positions are integers, so the rotation needs no gradient.
  return dx, d_scale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate.defvjp(_forward, _backward)


def _run(
  spec: _KernelSpec,
  kernel: Callable[..., None],
  arrays: list[Array],
  scale: Array,
  rotation: tuple[Array, Array],
  dtype: jnp.dtype,
) -> list[Array]:
  """One kernel over blocks of rows, all heads of a row together."""
  b, t, width = arrays[0].shape
  h, rows = width // spec.heads, spec.rows

  def block(size: int) -> pl.BlockSpec:
    """A block of rows, this wide."""
    return pl.BlockSpec((1, rows, size), lambda b, i: (b, i, 0))

  specs = [block(width)] * len(arrays)
  specs.append(pl.BlockSpec((1, h), lambda b, i: (0, 0)))
  specs += [block(h // 2)] * 2
  backward = kernel is _backward_kernel
  out_specs = [block(width)]
  out_shape = [jax.ShapeDtypeStruct((b, t, width), dtype)]
  if backward:
    # Sums over the rows of each step, which XLA adds afterwards.
    out_specs.append(pl.BlockSpec((1, 1, 1, h), lambda b, i: (b, i, 0, 0)))
    out_shape.append(jax.ShapeDtypeStruct((b, t // rows, 1, h), jnp.float32))
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    return pl.pallas_call(
      functools.partial(kernel, spec=spec),
      grid=(b, t // rows),
      in_specs=specs,
      out_specs=out_specs,
      out_shape=out_shape,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel')
      ),
      interpret=spec.interpret,
      name='rotate_backward' if backward else 'rotate_forward',
    )(*arrays, scale, *rotation)


def _tables(cos: Any, sin: Any) -> tuple[Array, Array]:
  """C and S of the file's docstring, for a block of rows."""
  c, s = cos[0], sin[0]
  return (
    jnp.concatenate([c, c], axis=1),
    jnp.concatenate([-s, s], axis=1),
  )


def _roll_by_half(dtype: jnp.dtype) -> Callable[[Array], Array]:
  """A function that swaps the two halves of a head."""
  if dtype != jnp.bfloat16:
    return lambda x: pltpu.roll(x, LANES // 2, 1)
  rows, columns = (
    jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
  )
  ones = (rows ^ (LANES // 2)) == columns
  permutation = jnp.where(ones, 1.0, 0.0).astype(dtype)
  return lambda x: jnp.dot(x, permutation, preferred_element_type=jnp.float32)


def _forward_kernel(
  x: Any, scale: Any, cos: Any, sin: Any, y: Any, *, spec: _KernelSpec
) -> None:
  """Writes y for a block of rows."""
  c, s = _tables(cos, sin)
  roll = _roll_by_half(x.dtype)
  if spec.norm:
    c, s = c * scale[...], s * pltpu.roll(scale[...], LANES // 2, 1)
  for head in range(spec.heads):
    at = slice(head * LANES, (head + 1) * LANES)
    n = x[0, :, at].astype(jnp.float32)
    rotated = n * c + roll(x[0, :, at]) * s
    if spec.norm:
      mean = jnp.mean(n * n, axis=1, keepdims=True)
      rotated *= jax.lax.rsqrt(mean + spec.eps)
    y[0, :, at] = rotated.astype(y.dtype)


def _backward_kernel(*refs: Any, spec: _KernelSpec) -> None:
  """Writes dx for a block of rows, and its share of the scale's gradient."""
  dy, x, scale, cos, sin, dx, d_scale = refs
  c, s = _tables(cos, sin)
  roll = _roll_by_half(dy.dtype)
  total = jnp.zeros(c.shape, jnp.float32)
  for head in range(spec.heads):
    at = slice(head * LANES, (head + 1) * LANES)
    d = dy[0, :, at].astype(jnp.float32) * c - roll(dy[0, :, at]) * s
    if spec.norm:
      n = x[0, :, at].astype(jnp.float32)
      mean = jnp.mean(n * n, axis=1, keepdims=True)
      inverse = jax.lax.rsqrt(mean + spec.eps)
      n = n * inverse
      product = d * n
      total += product
      d = d * scale[...]
      # d n is product times scale, which saves an array.
      along = jnp.mean(product * scale[...], axis=1, keepdims=True)
      d = (d - n * along) * inverse
    dx[0, :, at] = d.astype(dx.dtype)
  d_scale[0, 0] = jnp.sum(total, axis=0, keepdims=True)
