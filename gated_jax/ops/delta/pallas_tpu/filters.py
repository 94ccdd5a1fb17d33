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
on the gradients dz of a step's first few.

Sums over another document are masked. Steps that no document begins in or near
leave the masks out, which are a fifth of their time.
"""

import functools
import math
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

from gated_jax.chips import LANES
from gated_jax.ops.delta.norm import inverse_norm
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES

PIECE = 128  # tokens
HALO = 16  # tokens before a step: rows of a tile of bfloat16
ROWS = 32  # of these are computed together
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def filter_heads(
  x: Float[Array, 'B L C'],
  weights: Float[Array, 'S C'],
  history: Float[Array, 'B I C'],
  age: Int[Array, 'B L'] | None,
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
  call = _Call(x, age, spec, interpret)
  scratch = [call.rows(SUBLANES)] + [call.ages()] * (age is not None)
  (output,) = call.run(
    functools.partial(_forward_kernel, spec=spec, masked=age is not None),
    (x, x, history, weights),
    [('tokens', x.shape, x.dtype)],
    scratch,
    f'{spec.name}_forward',
  )
  return output, (x, weights, history, age)


def _backward(
  spec: FilterSpec,
  interpret: bool,
  saved: tuple[Any, ...],
  d_output: Float[Array, 'B L C'],
) -> tuple[Array, Array, Array, None]:
  x, weights, history, age = saved
  batch, _, channels = x.shape
  call = _Call(x, age, spec, interpret, backwards=True)
  sums = batch, spec.taps, SUBLANES, channels
  by_batch = batch, SUBLANES, channels
  scratch = [call.rows(SUBLANES), call.rows(2 * SUBLANES)]
  scratch += [call.ages()] * (age is not None)
  d_x, d_weights, d_history = call.run(
    functools.partial(_backward_kernel, spec=spec, masked=age is not None),
    (x, x, history, weights, d_output),
    [
      ('tokens', x.shape, x.dtype),
      ('sums', sums, jnp.float32),
      ('last', by_batch, jnp.float32),
    ],
    scratch,
    f'{spec.name}_backward',
  )
  d_weights = jnp.sum(d_weights, axis=(0, 2)).astype(weights.dtype)
  d_history = jnp.pad(d_history, [(0, 0), (HALO - SUBLANES, 0), (0, 0)])
  return (
    d_x,
    jnp.pad(d_weights, [(0, SUBLANES - spec.taps), (0, 0)]),
    d_history.astype(history.dtype),
    None,
  )


filter_heads.defvjp(_forward, _backward)


class _Call:
  """Steps over an array of inputs, and the part of each array in one."""

  def __init__(
    self,
    x: Float[Array, 'B L C'],
    age: Int[Array, 'B L'] | None,
    spec: FilterSpec,
    interpret: bool,
    backwards: bool = False,
  ):
    batch, length, channels = x.shape
    heads, most = channels // spec.width, max(1, LANES_OF_STEP // spec.width)
    self.lanes = spec.width * max(
      n for n in range(1, most + 1) if heads % n == 0
    )
    self.tokens = PIECE * (PIECES if length % (PIECE * PIECES) == 0 else 1)
    self.steps = length // self.tokens
    self.grid = batch, channels // self.lanes, self.steps
    self.spec, self.age, self.interpret = spec, age, interpret
    self.backwards = backwards

  def rows(self, more: int) -> Any:
    """Memory for the tokens of a step and some more, lanes by lanes."""
    shape = self.lanes // LANES, self.tokens + more, LANES
    return pltpu.VMEM(shape, jnp.float32)

  def ages(self) -> Any:
    """Memory for the ages of a step's tokens and of some around, spread."""
    return pltpu.VMEM((self.tokens + 2 * SUBLANES, LANES), jnp.int32)

  def begun(self) -> Int[Array, 'B S']:
    """1 for steps that read an input or a gradient of another document."""
    if self.age is None:
      return jnp.zeros((self.grid[0], self.steps), jnp.int32)
    few = self.spec.taps - 1
    young = self.age.reshape(self.grid[0], self.steps, self.tokens) < few
    own, first = jnp.any(young, axis=2), jnp.any(young[..., :few], axis=2)
    following = jnp.pad(first[:, 1:], [(0, 0), (0, 1)])
    return (own | following).astype(jnp.int32)

  def blocks(self) -> dict[str, pl.BlockSpec]:
    """The block of each array that a step reads or writes."""
    tokens, lanes, last = self.tokens, self.lanes, self.steps - 1
    halos = tokens // HALO

    def at(t: Any) -> Any:
      return last - t if self.backwards else t

    def of_age(b: Any, c: Any, t: Any, begun: Any) -> Any:
      # What is not read is not fetched: the place does not change.
      return b, jnp.where(begun[b, at(t)] > 0, at(t), 0), 0

    return {
      'tokens': pl.BlockSpec(
        (1, tokens, lanes), lambda b, c, t, _: (b, at(t), c)
      ),
      'before': pl.BlockSpec(
        (1, HALO, lanes),
        lambda b, c, t, _: (b, jnp.maximum(at(t) * halos - 1, 0), c),
      ),
      'rows': pl.BlockSpec((1, HALO, lanes), lambda b, c, t, _: (b, 0, c)),
      'weights': pl.BlockSpec((SUBLANES, lanes), lambda b, c, t, _: (0, c)),
      'age': pl.BlockSpec((1, tokens, 1), of_age),
      'sums': pl.BlockSpec(
        (1, self.spec.taps, SUBLANES, lanes), lambda b, c, t, _: (b, 0, 0, c)
      ),
      'last': pl.BlockSpec((1, SUBLANES, lanes), lambda b, c, t, _: (b, 0, c)),
    }

  def run(
    self,
    kernel: Any,
    arrays: tuple[Array, ...],
    written: list[tuple[str, tuple[int, ...], Any]],
    scratch: list[Any],
    name: str,
  ) -> list[Array]:
    """Calls a kernel.

    Args:
      kernel: takes references.
      arrays: inputs, inputs, those before them, weights, and a gradient.
      written: the block, shape and dtype of each output.
      scratch: memory of a step.
      name: of the kernel.
    """
    blocks = self.blocks()
    names = ['tokens', 'before', 'rows', 'weights', 'tokens'][: len(arrays)]
    if self.age is not None:
      arrays, names = (*arrays, self.age[..., None]), [*names, 'age']
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=self.grid,
        in_specs=[blocks[x] for x in names],
        out_specs=[blocks[x] for x, _, _ in written],
        scratch_shapes=scratch,
      ),
      out_shape=[jax.ShapeDtypeStruct(*array) for _, *array in written],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=(
          'parallel',
          'parallel',
          'arbitrary' if self.backwards else 'parallel',
        )
      ),
      interpret=self.interpret,
      name=name,
    )(self.begun(), *arrays)


class _Rows(NamedTuple):
  """Rows of a head that are computed together.

  Their inputs and gradients lie in memory that has SUBLANES rows before a
  step's, and each register of lanes by itself, so that a load can begin at any
  row: it moves them for nothing, where turning registers takes vector units.
  """

  start: int
  size: int
  lanes: slice

  def of(self, ref: Any, shift: int = 0) -> Float[Array, 'R H']:
    """Those of an array, or the ones so many rows later."""
    top = SUBLANES + self.start + shift
    rows = slice(top, top + self.size)
    tiles = range(self.lanes.start // LANES, self.lanes.stop // LANES)
    return jnp.concatenate([ref[i, rows] for i in tiles], axis=1)

  def of_document(
    self, ages: Any | None, lag: int, x: Float[Array, 'R H'], shift: int = 0
  ) -> Float[Array, 'R H']:
    """x, zero where a token has no inputs of its own document so far back."""
    if ages is None or not lag:
      return x
    top = SUBLANES + self.start + shift
    age = ages[top : top + self.size]
    parts = [
      jnp.where(age >= lag, x[:, i : i + LANES], 0)
      for i in range(0, x.shape[1], LANES)
    ]
    return jnp.concatenate(parts, axis=1)


def _all_rows(ref: Any, spec: FilterSpec) -> list[_Rows]:
  """The rows of a step, those of all heads together."""
  _, tokens, lanes = ref.shape
  return [
    _Rows(i, ROWS, slice(j, j + spec.width))
    for i in range(0, tokens, ROWS)
    for j in range(0, lanes, spec.width)
  ]


def _store_inputs(given: Sequence[Any], wide: Any, at_start: Array) -> None:
  """Inputs of a step and those before, in float32."""
  x, before, history = given[:3]
  tokens = x.shape[1]
  for i in range(wide.shape[0]):
    lanes = slice(i * LANES, (i + 1) * LANES)
    top, earlier = (
      ref[0, :, lanes].astype(jnp.float32)[HALO - SUBLANES :]
      for ref in (before, history)
    )
    wide[i, :SUBLANES] = jnp.where(at_start, earlier, top)
    wide[i, SUBLANES : SUBLANES + tokens] = x[0, :, lanes].astype(jnp.float32)


def _lags(
  rows: _Rows, wide: Any, ages: Any | None, spec: FilterSpec
) -> list[Float[Array, 'R H']]:
  """The inputs 0, 1, ... tokens before each; zeros are of other documents."""
  return [
    rows.of_document(ages, j, rows.of(wide, -j)) for j in range(spec.taps)
  ]


def _weighted(
  terms: Sequence[Float[Array, 'R H']], weights: Any, rows: _Rows
) -> Float[Array, 'R H']:
  """The sum of terms times the filter's weights."""
  total = terms[0] * weights[0:1, rows.lanes]
  for j, x in enumerate(terms[1:], 1):
    total += x * weights[j : j + 1, rows.lanes]
  return total


def sigmoid(z: Float[Array, 'R H']) -> Float[Array, 'R H']:
  """The sigmoid, without the cases that a division has to look for."""
  # From here on the sigmoid is nothing, and its reciprocal is finite.
  power = jnp.minimum(z * -math.log2(math.e), 120.0)
  return pl.reciprocal(1 + jnp.exp2(power), full_range=False)


def _forward_kernel(
  begun: Any, *arrays: Any, spec: FilterSpec, masked: bool
) -> None:
  """Some tokens of some heads."""
  given = arrays[: 4 + masked]
  output, wide, *ages = arrays[4 + masked :]
  batch, step = pl.program_id(0), pl.program_id(2)
  weights = given[3]
  _store_inputs(given, wide, step == 0)

  def compute(ages: Any | None) -> None:
    """The outputs of a step whose documents have these ages."""
    for rows in _all_rows(output, spec):
      z = _weighted(_lags(rows, wide, ages, spec), weights, rows)
      y = z * sigmoid(z)
      if spec.scale:
        y *= spec.scale * inverse_norm(y)
      at = 0, slice(rows.start, rows.start + rows.size), rows.lanes
      output[at] = y.astype(output.dtype)

  _by_documents(compute, begun[batch, step], given[4:], ages)


def _by_documents(
  compute: Any, begun: Array, age: Sequence[Any], ages: Sequence[Any]
) -> None:
  """Runs a step: few are near a document's begin, and others need no masks.

  Args:
    compute: a function of the ages in memory.
    begun: whether the step needs them.
    age: the ages of its tokens; nothing: there are no documents.
    ages: where they are spread over lanes, which is slow, once for all heads.
  """
  if not age:
    compute(None)
    return

  @pl.when(begun == 0)
  def _within() -> None:
    compute(None)

  @pl.when(begun != 0)
  def _at_begin() -> None:
    column = age[0][0]
    shape = column.shape[0], LANES
    spread = jnp.broadcast_to(column, shape)
    ages[0][SUBLANES : SUBLANES + shape[0]] = spread
    compute(ages[0])


def _backward_kernel(
  begun: Any, *arrays: Any, spec: FilterSpec, masked: bool
) -> None:
  """Gradients of some tokens of some heads, and of their filters."""
  given, written = arrays[: 5 + masked], arrays[5 + masked : 8 + masked]
  wide, slopes, *ages = arrays[8 + masked :]
  weights, d_output = given[3:5]
  d_x, d_weights, d_history = written
  batch, step = pl.program_id(0), pl.program_id(2)
  last, tokens = pl.num_programs(2) - 1, d_x.shape[1]
  first = slice(SUBLANES, 2 * SUBLANES)
  below = slice(SUBLANES + tokens, 2 * SUBLANES + tokens)

  @pl.when(step == 0)
  def _begin() -> None:
    slopes[...] = jnp.zeros_like(slopes)
    d_weights[...] = jnp.zeros_like(d_weights)
    for ref in ages:
      ref[...] = jnp.zeros_like(ref)

  # The first rows of the step before are those that follow this one's.
  slopes[:, below] = slopes[:, first]
  for ref in ages:
    ref[below] = ref[first]
    ref[first] = jnp.full_like(ref[first], spec.taps)
  _store_inputs(given, wide, step == last)

  def to_inputs(rows: _Rows, ages: Any | None) -> Array:
    """Gradients of inputs."""
    terms = [
      rows.of_document(ages, j, rows.of(slopes, j), j) for j in range(spec.taps)
    ]
    return _weighted(terms, weights, rows)

  def compute(ages: Any | None) -> None:
    """The gradients of a step whose documents have these ages."""
    for rows in reversed(_all_rows(d_x, spec)):
      at = 0, slice(rows.start, rows.start + rows.size), rows.lanes
      lags = _lags(rows, wide, ages, spec)
      z = _weighted(lags, weights, rows)
      dz = _before_silu(z, d_output[at].astype(jnp.float32), spec)
      for j, x in enumerate(lags):
        parts = (dz * x).reshape(-1, SUBLANES, spec.width)
        d_weights[0, j, :, rows.lanes] += jnp.sum(parts, axis=0)
      top = SUBLANES + rows.start
      for i in range(0, spec.width, LANES):
        tile = (rows.lanes.start + i) // LANES
        slopes[tile, top : top + rows.size] = dz[:, i : i + LANES]
      d_x[at] = to_inputs(rows, ages).astype(d_x.dtype)

  _by_documents(compute, begun[batch, last - step], given[5:], ages)

  @pl.when(step == last)
  def _end() -> None:
    for i in range(0, d_x.shape[2], spec.width):
      rows = _Rows(-SUBLANES, SUBLANES, slice(i, i + spec.width))
      history = to_inputs(rows, ages[0] if masked else None)
      d_history[0, :, rows.lanes] = history


def _before_silu(
  z: Float[Array, 'R H'], slope: Float[Array, 'R H'], spec: FilterSpec
) -> Float[Array, 'R H']:
  """The gradient of z from that of the output."""
  open_share = sigmoid(z)
  y = z * open_share
  if spec.scale:
    inverse = inverse_norm(y)
    along = jnp.sum(y * slope, axis=1, keepdims=True) * (inverse * inverse)
    slope = (spec.scale * inverse) * (slope - y * along)
  return slope * (open_share + y * (1 - open_share))
