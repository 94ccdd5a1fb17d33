"""The norm and the gate on the outputs of heads, in one pass, and back.

    out = scale r y act(z)            r = 1 / sqrt(mean(y^2) + eps) by head

The backward pass makes r again. With s = scale act(z) and the gradient g,

    dy = r (g s - y r^2 mean(g s y))
    dz = g scale r y act'(z)          dscale = sum of g r y act(z)

Each array is read once and written once, with heads side by side as the kernels
of the rule and the products around them have them.
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

from gated_jax.ops.delta.pallas_tpu.filters import LANES_OF_STEP
from gated_jax.ops.delta.pallas_tpu.filters import PIECE
from gated_jax.ops.delta.pallas_tpu.filters import sigmoid
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES


class NormSpec(NamedTuple):
  """Sizes and kinds of a call."""

  width: int  # channels of a head
  eps: float
  activation: str  # 'silu' or 'sigmoid'


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_and_gate(
  y: Float[Array, 'B L C'],
  logits: Float[Array, 'B L C'],
  scale: Float[Array, ' H'],
  spec: NormSpec,
  interpret: bool = False,
) -> Float[Array, 'B L C']:
  """Normed and gated heads, which lie side by side, in the dtype of y.

  Args:
    y: what heads read; L is a multiple of PIECE.
    logits: of the gate.
    scale: of the norm, the same for all heads.
    spec: sizes and kinds.
    interpret: run it on any device, slowly.
  """
  return _forward(y, logits, scale, spec, interpret)[0]


def _forward(
  y: Array, logits: Array, scale: Array, spec: NormSpec, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
  grid, tokens, numbers = _blocks(y, spec)
  output = pl.pallas_call(
    functools.partial(_forward_kernel, spec=spec),
    grid=grid,
    in_specs=[tokens, tokens, numbers],
    out_specs=tokens,
    out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel')
    ),
    interpret=interpret,
    name='delta_norm_forward',
  )(y, logits, _as_rows(scale))
  return output, (y, logits, scale)


def _backward(
  spec: NormSpec,
  interpret: bool,
  saved: tuple[Array, ...],
  d_output: Float[Array, 'B L C'],
) -> tuple[Array, Array, Array]:
  y, logits, scale = saved
  grid, tokens, numbers = _blocks(y, spec)
  parts = (*grid[:2], SUBLANES, spec.width)
  d_y, d_logits, d_scale = pl.pallas_call(
    functools.partial(_backward_kernel, spec=spec),
    grid=grid,
    in_specs=[tokens, tokens, numbers, tokens],
    out_specs=[
      tokens,
      tokens,
      pl.BlockSpec((1, 1, SUBLANES, spec.width), lambda b, c, t: (b, c, 0, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(y.shape, y.dtype),
      jax.ShapeDtypeStruct(logits.shape, logits.dtype),
      jax.ShapeDtypeStruct(parts, jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='delta_norm_backward',
  )(y, logits, _as_rows(scale), d_output)
  return d_y, d_logits, jnp.sum(d_scale, axis=(0, 1, 2)).astype(scale.dtype)


norm_and_gate.defvjp(_forward, _backward)


def _as_rows(scale: Float[Array, ' H']) -> Float[Array, 'S H']:
  """The scale in every row of a register."""
  return jnp.broadcast_to(scale.astype(jnp.float32), (SUBLANES, *scale.shape))


def _blocks(
  y: Float[Array, 'B L C'], spec: NormSpec
) -> tuple[tuple[int, int, int], pl.BlockSpec, pl.BlockSpec]:
  """Steps, and where arrays of tokens and the scale lie in one."""
  batch, length, channels = y.shape
  heads = channels // spec.width
  most = max(1, LANES_OF_STEP // spec.width)
  lanes = spec.width * max(n for n in range(1, most + 1) if heads % n == 0)
  tokens = PIECE * (2 if length % (2 * PIECE) == 0 else 1)
  return (
    (batch, channels // lanes, length // tokens),
    pl.BlockSpec((1, tokens, lanes), lambda b, c, t: (b, t, c)),
    pl.BlockSpec((SUBLANES, spec.width), lambda b, c, t: (0, 0)),
  )


def _pieces(ref: Any, spec: NormSpec) -> list[tuple[int, slice, slice]]:
  """A head's tokens of a step: rows and lanes of its blocks."""
  _, tokens, lanes = ref.shape
  return [
    (0, slice(i, i + PIECE), slice(j, j + spec.width))
    for i in range(0, tokens, PIECE)
    for j in range(0, lanes, spec.width)
  ]


def _forward_kernel(*refs: Any, spec: NormSpec) -> None:
  """Some tokens of some heads."""
  y_ref, logits_ref, scale, output = refs
  for at in _pieces(y_ref, spec):
    y, z = (x[at].astype(jnp.float32) for x in (y_ref, logits_ref))
    inverse = _inverse(y, spec)
    normed = y * inverse * scale[0:1]
    output[at] = (normed * _gate(z, spec)[0]).astype(output.dtype)


def _backward_kernel(*refs: Any, spec: NormSpec) -> None:
  """Gradients of some tokens of some heads, and of the scale."""
  y_ref, logits_ref, scale, d_output, d_y, d_logits, d_scale = refs

  @pl.when(pl.program_id(2) == 0)
  def _begin() -> None:
    d_scale[...] = jnp.zeros_like(d_scale)

  for at in _pieces(y_ref, spec):
    y, z, slope = (
      x[at].astype(jnp.float32) for x in (y_ref, logits_ref, d_output)
    )
    inverse = _inverse(y, spec)
    normed = y * inverse
    gate, d_gate = _gate(z, spec)
    to_scale = slope * normed
    d_logits[at] = (to_scale * scale[0:1] * d_gate).astype(d_logits.dtype)
    rows = (to_scale * gate).reshape(-1, SUBLANES, spec.width)
    d_scale[0, 0] += jnp.sum(rows, axis=0)
    slope *= gate * scale[0:1]
    along = jnp.mean(slope * normed, axis=1, keepdims=True)
    d_y[at] = (inverse * (slope - normed * along)).astype(d_y.dtype)


def _inverse(y: Float[Array, 'P H'], spec: NormSpec) -> Float[Array, 'P 1']:
  mean = jnp.mean(y * y, axis=1, keepdims=True)
  return jax.lax.rsqrt(mean + spec.eps)


def _gate(z: Float[Array, 'P H'], spec: NormSpec) -> tuple[Array, Array]:
  """act(z) and its derivative."""
  share = sigmoid(z)
  if spec.activation == 'sigmoid':
    return share, share * (1 - share)
  gate = z * share
  return gate, share + gate * (1 - share)
