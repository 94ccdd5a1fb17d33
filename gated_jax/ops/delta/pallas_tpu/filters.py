"""The filters, SiLU and the norm of each head, in one pass over the tokens.

    z_t = sum_j w_j x_(t - j)      over the inputs of the same document
    a   = silu(z)
    out = a,  or  scale a / |a|      for each head

Left to XLA every step of this is an array of its own, some of them float32, and
heads are laid out in another way than the kernels of the rule read them. Here
each input is read once, each output written once, with heads side by side.

The backward pass makes z again. With the gradient dz,

    dx_t = sum_j w_j dz_(t + j)      dw_j = sum_t dz_t x_(t - j)

so that steps of the grid take the tokens from the last to the first, and hand
on what the first few of a step give to the tokens before them.
"""

import functools
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.delta.norm import inverse_norm
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES

PIECE = 128  # tokens that are computed together
HALO = 16  # tokens before a step: rows of a tile of bfloat16
PIECES = 2  # a step takes so many, where they divide the row
LANES_OF_STEP = 512


class FilterSpec(NamedTuple):
  """Sizes of a call."""

  width: int  # channels of a head
  taps: int  # inputs that a filter sums
  scale: float  # the length that heads get; 0: they keep their own

  @property
  def name(self) -> str:
    """Names its kernels."""
    return 'delta_unit_filter' if self.scale else 'delta_filter'


class _Piece(NamedTuple):
  """A head's tokens of a step: rows and lanes of its blocks."""

  number: int
  lanes: slice
  # Inputs before each token that are of its document, the same in all lanes;
  # None: all are.
  age: Int[Array, 'P H'] | None

  @property
  def rows(self) -> slice:
    """Its tokens."""
    return slice(self.number * PIECE, (self.number + 1) * PIECE)

  def of_document(
    self, lag: int, x: Float[Array, 'P H']
  ) -> Float[Array, 'P H']:
    """x, zero where a token has no inputs of its own document so far back."""
    return x if self.age is None else jnp.where(self.age >= lag, x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def filter_heads(
  x: Float[Array, 'B L C'],
  weights: Float[Array, 'S C'],
  history: Float[Array, 'B I C'],
  age: Int[Array, 'B L 1'] | None,
  spec: FilterSpec,
  interpret: bool = False,
) -> Float[Array, 'B L C']:
  """Filtered heads, which lie side by side, in the dtype of x.

  Args:
    x: inputs; L is a multiple of PIECE.
    weights: row j multiplies the input j tokens before; float32.
    history: the last HALO inputs before x.
    age: inputs before each token that are of its document; None: all are.
    spec: sizes.
    interpret: run it on any device, slowly.
  """
  return _forward(x, weights, history, age, spec, interpret)[0]


def _forward(
  x: Array,
  weights: Array,
  history: Array,
  age: Array | None,
  spec: FilterSpec,
  interpret: bool,
) -> tuple[Array, tuple[Array | None, ...]]:
  arrays = (x, x, history, weights, *([] if age is None else [age]))
  grid, blocks = _grid(x, spec), _blocks(x, spec)
  given = [
    blocks['tokens'],
    blocks['before'],
    blocks['rows'],
    blocks['weights'],
  ]
  (output,) = pl.pallas_call(
    functools.partial(_forward_kernel, spec=spec, masked=age is not None),
    grid=grid,
    in_specs=given + [blocks['age']] * (age is not None),
    out_specs=[blocks['tokens']],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel')
    ),
    interpret=interpret,
    name=f'{spec.name}_forward',
  )(*arrays)
  return output, (x, weights, history, age)


def _backward(
  spec: FilterSpec,
  interpret: bool,
  saved: tuple[Any, ...],
  d_output: Float[Array, 'B L C'],
) -> tuple[Array, Array, Array, None]:
  x, weights, history, age = saved
  batch, _, channels = x.shape
  grid, blocks = _grid(x, spec), _blocks(x, spec, backwards=True)
  arrays = (x, x, history, weights, *([] if age is None else [age]))
  given = [
    blocks['tokens'],
    blocks['before'],
    blocks['rows'],
    blocks['weights'],
  ]
  lanes = _lanes(x, spec)
  by_batch = jax.ShapeDtypeStruct((batch, SUBLANES, channels), jnp.float32)
  d_x, d_weights, d_history = pl.pallas_call(
    functools.partial(_backward_kernel, spec=spec, masked=age is not None),
    grid=grid,
    in_specs=given + [blocks['age']] * (age is not None) + [blocks['tokens']],
    out_specs=[blocks['tokens'], blocks['sums'], blocks['sums']],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), by_batch, by_batch],
    scratch_shapes=[pltpu.VMEM((SUBLANES, lanes), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name=f'{spec.name}_backward',
  )(*arrays, d_output)
  d_history = jnp.pad(d_history, [(0, 0), (HALO - SUBLANES, 0), (0, 0)])
  return (
    d_x,
    jnp.sum(d_weights, axis=0).astype(weights.dtype),
    d_history.astype(history.dtype),
    None,
  )


filter_heads.defvjp(_forward, _backward)


def _lanes(x: Float[Array, 'B L C'], spec: FilterSpec) -> int:
  """Channels of a step: whole heads that divide them all."""
  heads = x.shape[2] // spec.width
  most = max(1, LANES_OF_STEP // spec.width)
  return spec.width * max(n for n in range(1, most + 1) if heads % n == 0)


def _tokens(x: Float[Array, 'B L C']) -> int:
  """Tokens of a step."""
  return PIECE * (PIECES if x.shape[1] % (PIECE * PIECES) == 0 else 1)


def _grid(x: Float[Array, 'B L C'], spec: FilterSpec) -> tuple[int, int, int]:
  return x.shape[0], x.shape[2] // _lanes(x, spec), x.shape[1] // _tokens(x)


def _blocks(
  x: Float[Array, 'B L C'], spec: FilterSpec, backwards: bool = False
) -> dict[str, pl.BlockSpec]:
  """The block of each array that a step reads or writes."""
  tokens, lanes = _tokens(x), _lanes(x, spec)
  last = x.shape[1] // tokens - 1
  halos = tokens // HALO

  def at(t: Any) -> Any:
    return last - t if backwards else t

  return {
    'tokens': pl.BlockSpec((1, tokens, lanes), lambda b, c, t: (b, at(t), c)),
    'before': pl.BlockSpec(
      (1, HALO, lanes),
      lambda b, c, t: (b, jnp.maximum(at(t) * halos - 1, 0), c),
    ),
    'rows': pl.BlockSpec((1, HALO, lanes), lambda b, c, t: (b, 0, c)),
    'weights': pl.BlockSpec((SUBLANES, lanes), lambda b, c, t: (0, c)),
    'age': pl.BlockSpec((1, tokens, 1), lambda b, c, t: (b, at(t), 0)),
    'sums': pl.BlockSpec((1, SUBLANES, lanes), lambda b, c, t: (b, 0, c)),
  }


class _Inputs(NamedTuple):
  """Arrays of a step in VMEM that both passes read."""

  x: Any
  before: Any
  history: Any
  weights: Any
  age: Any | None

  def pieces(self, spec: FilterSpec) -> list[_Piece]:
    """All pieces of a step, a piece's heads one after the other."""
    _, tokens, lanes = self.x.shape
    pieces = []
    for p in range(tokens // PIECE):
      age = None
      if self.age is not None:
        # Spreading a column over the lanes is slow: once for all heads.
        column = self.age[0, p * PIECE : (p + 1) * PIECE]
        age = jnp.broadcast_to(column, (PIECE, spec.width))
      pieces += [
        _Piece(p, slice(i, i + spec.width), age)
        for i in range(0, lanes, spec.width)
      ]
    return pieces

  def lagged(
    self, piece: _Piece, taps: int, at_start: Array
  ) -> list[Float[Array, 'P H']]:
    """The inputs 0, 1, ... tokens before each; zeros are of other documents."""
    x = self.x[0, piece.rows, piece.lanes].astype(jnp.float32)
    if piece.number:
      top = piece.rows.start
      before = self.x[0, top - HALO : top, piece.lanes].astype(jnp.float32)
    else:
      history = self.history[0, :, piece.lanes].astype(jnp.float32)
      before = self.before[0, :, piece.lanes].astype(jnp.float32)
      before = jnp.where(at_start, history, before)
    before = before[HALO - SUBLANES :]
    row = jax.lax.broadcasted_iota(jnp.int32, before.shape, 0)
    lags = [x]
    for j in range(1, taps):
      late = pltpu.roll(x, j, 0)
      top = jnp.where(row < j, pltpu.roll(before, j, 0), late[:SUBLANES])
      late = jnp.concatenate([top, late[SUBLANES:]], axis=0)
      lags.append(piece.of_document(j, late))
    return lags

  def filtered(
    self, piece: _Piece, lags: Sequence[Array]
  ) -> Float[Array, 'P H']:
    """z of these lags."""
    total = lags[0] * self.weights[0:1, piece.lanes]
    for j, x in enumerate(lags[1:], 1):
      total += x * self.weights[j : j + 1, piece.lanes]
    return total


def _forward_kernel(*arrays: Any, spec: FilterSpec, masked: bool) -> None:
  """Some tokens of some heads."""
  *given, output = arrays
  x, before, history, weights = given[:4]
  age = given[4] if masked else None
  inputs = _Inputs(x, before, history, weights, age)
  at_start = pl.program_id(2) == 0
  for piece in inputs.pieces(spec):
    z = inputs.filtered(piece, inputs.lagged(piece, spec.taps, at_start))
    y = z * jax.nn.sigmoid(z)
    if spec.scale:
      y *= spec.scale * inverse_norm(y)
    output[0, piece.rows, piece.lanes] = y.astype(output.dtype)


def _backward_kernel(*arrays: Any, spec: FilterSpec, masked: bool) -> None:
  """Gradients of some tokens of some heads, and of their filters."""
  *given, d_output, d_x, d_weights, d_history, handed_on = arrays
  x, before, history, weights = given[:4]
  age = given[4] if masked else None
  inputs = _Inputs(x, before, history, weights, age)
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _begin() -> None:
    handed_on[...] = jnp.zeros_like(handed_on)
    d_weights[...] = jnp.zeros_like(d_weights)

  at_start = step == pl.num_programs(2) - 1
  for piece in reversed(inputs.pieces(spec)):
    lags = inputs.lagged(piece, spec.taps, at_start)
    z = inputs.filtered(piece, lags)
    slope = d_output[0, piece.rows, piece.lanes].astype(jnp.float32)
    dz = _before_silu(z, slope, spec)
    for j, x in enumerate(lags):
      d_weights[0, j : j + 1, piece.lanes] += jnp.sum(
        dz * x, axis=0, keepdims=True
      )
    own, before = _to_inputs(piece, dz, inputs, spec)
    bottom = own[PIECE - SUBLANES :] + handed_on[:, piece.lanes]
    own = jnp.concatenate([own[: PIECE - SUBLANES], bottom], axis=0)
    d_x[0, piece.rows, piece.lanes] = own.astype(d_x.dtype)
    handed_on[:, piece.lanes] = before
  d_history[0] = handed_on[...]


def _before_silu(
  z: Float[Array, 'P H'], slope: Float[Array, 'P H'], spec: FilterSpec
) -> Float[Array, 'P H']:
  """The gradient of z from that of the output."""
  open_share = jax.nn.sigmoid(z)
  if spec.scale:
    y = z * open_share
    inverse = inverse_norm(y)
    along = jnp.sum(y * slope, axis=1, keepdims=True) * (inverse * inverse)
    slope = (spec.scale * inverse) * (slope - y * along)
  return slope * open_share * (1 + z * (1 - open_share))


def _to_inputs(
  piece: _Piece, dz: Float[Array, 'P H'], inputs: _Inputs, spec: FilterSpec
) -> tuple[Float[Array, 'P H'], Float[Array, 'S H']]:
  """Gradients of a piece's inputs, and of the last ones before it."""
  own = dz * inputs.weights[0:1, piece.lanes]
  top, bottom = own[: PIECE - SUBLANES], own[PIECE - SUBLANES :]
  before = jnp.zeros_like(bottom)
  row = jax.lax.broadcasted_iota(jnp.int32, bottom.shape, 0)
  for j in range(1, spec.taps):
    earlier = dz * inputs.weights[j : j + 1, piece.lanes]
    earlier = piece.of_document(j, earlier)
    # The first j rows come out last: they are of the piece before.
    earlier = pltpu.roll(earlier, PIECE - j, 0)
    top += earlier[: PIECE - SUBLANES]
    last = earlier[PIECE - SUBLANES :]
    inside = row < SUBLANES - j
    bottom += jnp.where(inside, last, 0)
    before += jnp.where(inside, 0, last)
  return jnp.concatenate([top, bottom], axis=0), before
