"""The kernels as one function of arrays, with its gradients.

Chunks are twice as long as those of `gated_jax/ops/delta/chunks.py`: matrices
[128, 128] fill the lanes and the matrix units, and a token costs no more.
Heads stay side by side, as projections write them: [B, T, K H] and [B, T, N V].
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.delta.chunks import pad_tokens
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.inputs import State
from gated_jax.ops.delta.pallas_tpu import backward
from gated_jax.ops.delta.pallas_tpu import forward
from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES
from gated_jax.ops.delta.pallas_tpu.spec import CHUNKS
from gated_jax.ops.delta.pallas_tpu.spec import Spec
from gated_jax.ops.delta.pallas_tpu.tokens import gradients_of
from gated_jax.ops.delta.pallas_tpu.tokens import rows_of

# A step of the grid takes as many key heads as there can be, of these.
KEY_HEADS = (4, 2, 1)
# Remat policies know what the forward kernel saves by this name. It is large;
# without it the kernel runs once more before the backward one.
RESIDUALS_NAME = 'delta_residuals'
# Tokens of a step.
BLOCK = CHUNKS * CHUNK


def refusal(inputs: Inputs) -> str:
  """The reason why the kernel cannot do this; '' where it can."""
  widths = inputs.key.shape[3], inputs.value.shape[3]
  if any(width % LANES for width in widths):
    return f'heads of {widths[0]} and {widths[1]} channels are no whole {LANES}'
  if inputs.value.dtype not in (jnp.bfloat16, jnp.float32):
    return f'arrays are {inputs.value.dtype}'
  return ''


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_kernel(
  inputs: Inputs,
  state: State,
  first: Bool[Array, 'B T'] | None,
  interpret: bool = False,
) -> tuple[Float[Array, 'B T N V'], State]:
  """Computes what each token reads, and the state after the last one.

  Args:
    inputs: of all tokens; see `refusal`.
    state: before the first token.
    first: True at the first token of a document; None: nowhere.
    interpret: run it on any device, slowly.
  """
  output, last = _run_forward(_Arrays.of(inputs, first), state, interpret)
  return _heads_apart(output, inputs.value).astype(jnp.float32), last


# Inputs, first tokens, and what the forward kernel saves: e, T and S.
_Saved = tuple[Inputs, Array | None, tuple[Array, ...]]


def _forward(
  inputs: Inputs, state: State, first: Array | None, interpret: bool
) -> tuple[tuple[Array, Array], _Saved]:
  output, last, *saved = _run_forward(
    _Arrays.of(inputs, first), state, interpret, saves=True
  )
  output = _heads_apart(output, inputs.value).astype(jnp.float32)
  residuals = tuple(checkpoint_name(x, RESIDUALS_NAME) for x in saved)
  return (output, last), (inputs, first, residuals)


def _backward(
  interpret: bool, saved: _Saved, slopes: tuple[Array, Array]
) -> tuple[Inputs, Array, None]:
  inputs, first, residuals = saved
  d_output, d_last = slopes
  arrays = _Arrays.of(inputs, first)
  d_output = d_output.astype(inputs.value.dtype)
  d_output = pad_tokens(d_output, -d_output.shape[1] % BLOCK)
  d_output = d_output.reshape(arrays.value.shape)
  query, key, value, rows, columns, d_state = _run_backward(
    arrays, residuals, d_output, d_last, interpret
  )
  log_decay, beta = gradients_of(arrays.rows, rows, columns, arrays.first)
  length = inputs.beta.shape[1]
  d_inputs = Inputs(
    _heads_apart(query, inputs.query),
    _heads_apart(key, inputs.key),
    _heads_apart(value, inputs.value),
    log_decay[:, :length].astype(inputs.log_decay.dtype),
    beta[:, :length].astype(inputs.beta.dtype),
  )
  return d_inputs, d_state, None


by_kernel.defvjp(_forward, _backward)


def _heads_apart(
  packed: Float[Array, 'B L NV'], like: Float[Array, 'B T N V']
) -> Float[Array, 'B T N V']:
  """Heads on an axis of their own, without padded tokens."""
  return packed[:, : like.shape[1]].reshape(like.shape)


class _Arrays(NamedTuple):
  """Inputs with whole steps of tokens, as kernels read them."""

  query: Float[Array, 'B L KH']
  key: Float[Array, 'B L KH']
  value: Float[Array, 'B L NV']
  rows: Float[Array, 'B N R L']
  first: Bool[Array, 'B L']
  spec: Spec

  @classmethod
  def of(cls, inputs: Inputs, first: Array | None) -> '_Arrays':
    """Pads tokens and packs heads side by side."""
    batch, length, key_heads, width = inputs.key.shape
    if first is None:
      first = jnp.zeros((batch, length), bool)
    pad = -length % BLOCK
    first = pad_tokens(first, pad)
    inputs = Inputs(*(pad_tokens(x, pad) for x in inputs))
    query, key, value = (x.reshape(*x.shape[:2], -1) for x in inputs[:3])
    keys = next(n for n in KEY_HEADS if key_heads % n == 0)
    spec = Spec(keys, inputs.repeats, width, inputs.value.shape[3])
    return cls(query, key, value, rows_of(inputs, first), first, spec)

  @property
  def columns(self) -> Float[Array, 'B G L R']:
    """The rows of a step's value heads, turned, and side by side."""
    batch, _, _, length = self.rows.shape
    numbers = len(self.spec.heads) * SUBLANES
    return jnp.swapaxes(self.rows.reshape(batch, -1, numbers, length), 2, 3)

  def blocks(self, backwards: bool = False) -> '_Blocks':
    """Steps over these arrays."""
    batch, length, width = self.key.shape
    groups = width // (self.spec.keys * self.spec.width)
    return _Blocks(self.spec, (batch, groups, length // BLOCK), backwards)


class _Blocks(NamedTuple):
  """The grid, and the part of each kind of array that a step sees."""

  spec: Spec
  grid: tuple[int, int, int]
  backwards: bool  # steps begin with the last chunks

  def _part(self, shape: tuple[int, ...], tokens: int) -> pl.BlockSpec:
    """Parts of an array [B, G, ...], or [B, L, ...] with heads packed."""

    def at(b: Any, g: Any, c: Any) -> tuple[Any, ...]:
      """The place of a step's part, in parts."""
      c = self.grid[2] - 1 - c if self.backwards else c
      if len(shape) == 3:
        return b, c, g
      return b, g, *(c if axis == tokens else 0 for axis in (2, 3))

    return pl.BlockSpec(shape, at)

  @property
  def by_key(self) -> pl.BlockSpec:
    """Channels of key heads."""
    return self._part((1, BLOCK, self.spec.keys * self.spec.width), 1)

  @property
  def by_value(self) -> pl.BlockSpec:
    """Channels of value heads."""
    return self._part((1, BLOCK, len(self.spec.heads) * self.spec.channels), 1)

  @property
  def by_row(self) -> pl.BlockSpec:
    """Numbers of tokens in rows."""
    return self._part((1, len(self.spec.heads), SUBLANES, BLOCK), 3)

  @property
  def by_column(self) -> pl.BlockSpec:
    """Numbers of tokens in columns."""
    return self._part((1, 1, BLOCK, len(self.spec.heads) * SUBLANES), 2)

  @property
  def inverses(self) -> pl.BlockSpec:
    """A matrix for each chunk, its rows in the place of tokens."""
    return self._part((1, len(self.spec.heads), BLOCK, CHUNK), 2)

  @property
  def states(self) -> pl.BlockSpec:
    """The states that chunks start from, one below the other."""
    rows = CHUNKS * self.spec.width
    return self._part((1, len(self.spec.heads), rows, self.spec.channels), 2)

  @property
  def state(self) -> pl.BlockSpec:
    """States before or after the row."""
    sizes = self.spec.width, self.spec.channels
    return self._part((1, len(self.spec.heads), *sizes), 0)

  def call(
    self, kernel: Any, name: str, specs: tuple[Any, Any], interpret: bool
  ) -> Any:
    """The call of a kernel, a function of arrays.

    Args:
      kernel: takes references and `spec`.
      name: of the kernel.
      specs: those of the arrays that go in, and (spec, shape, dtype) of others.
      interpret: run it on any device, slowly.
    """
    given, written = specs
    sizes = len(self.spec.heads), self.spec.width, self.spec.channels
    return pl.pallas_call(
      functools.partial(kernel, spec=self.spec),
      grid=self.grid,
      in_specs=given,
      out_specs=[spec for spec, _, _ in written],
      out_shape=[jax.ShapeDtypeStruct(*array) for _, *array in written],
      scratch_shapes=[pltpu.VMEM(sizes, jnp.float32)],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', 'arbitrary')
      ),
      interpret=interpret,
      name=name,
    )


def _run_forward(
  arrays: _Arrays, state: State, interpret: bool, saves: bool = False
) -> list[Array]:
  """Output and the last state; with `saves`, e, T and S of each chunk."""
  b, value = arrays.blocks(), arrays.value
  batch, heads, width, channels = state.shape
  length = value.shape[1]
  given = [b.by_key, b.by_key, b.by_value, b.by_row, b.by_column, b.state]
  written = [
    (b.by_value, value.shape, value.dtype),
    (b.state, state.shape, jnp.float32),
  ]
  if saves:
    states = (batch, heads, length // CHUNK * width, channels)
    written += [
      (b.by_value, value.shape, value.dtype),
      (b.inverses, (batch, heads, length, CHUNK), value.dtype),
      (b.states, states, value.dtype),
    ]
  kernel = functools.partial(forward.kernel, saves=saves)
  run = b.call(kernel, 'gated_delta_forward', (given, written), interpret)
  return run(*arrays[:4], arrays.columns, state)


def _run_backward(
  arrays: _Arrays,
  residuals: tuple[Array, ...],
  d_output: Float[Array, 'B L NV'],
  d_last: State,
  interpret: bool,
) -> list[Array]:
  """Gradients of query, key, value, rows, columns and the first state."""
  b, columns = arrays.blocks(backwards=True), arrays.columns
  given = [b.by_key, b.by_key, b.by_row, b.by_column]
  given += [b.by_value, b.inverses, b.states, b.by_value, b.state]
  written = [
    (b.by_key, arrays.query.shape, arrays.query.dtype),
    (b.by_key, arrays.key.shape, arrays.key.dtype),
    (b.by_value, arrays.value.shape, arrays.value.dtype),
    (b.by_row, arrays.rows.shape, jnp.float32),
    (b.by_column, columns.shape, jnp.float32),
    (b.state, d_last.shape, jnp.float32),
  ]
  run = b.call(
    backward.kernel, 'gated_delta_backward', (given, written), interpret
  )
  return run(
    *(arrays.query, arrays.key, arrays.rows, columns),
    *(*residuals, d_output, d_last),
  )
