"""The kernels as one function of arrays, with its gradients.

Chunks are twice as long as those of `gated_jax/ops/delta/chunks.py`: matrices
[128, 128] fill the lanes and the matrix units, and a token costs no more.
Heads stay side by side, as projections write them: [B, T, K H] and [B, T, N V].
Gradients are those of the chunks in plain arrays, computed from the inputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.delta.chunks import by_chunks
from gated_jax.ops.delta.chunks import pad_tokens
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.inputs import State
from gated_jax.ops.delta.pallas_tpu import forward
from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES
from gated_jax.ops.delta.pallas_tpu.tokens import rows_of

# A step of the grid takes so many key heads where they divide.
KEY_HEADS = 2


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
  return _call(inputs, state, first, interpret)


def _forward(
  inputs: Inputs, state: State, first: Array | None, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Inputs, State, Array | None]]:
  return _call(inputs, state, first, interpret), (inputs, state, first)


def _backward(
  interpret: bool,
  saved: tuple[Inputs, State, Array | None],
  slopes: tuple[Array, Array],
) -> tuple[Inputs, Array, None]:
  inputs, state, first = saved
  _, pull = jax.vjp(lambda x, s: by_chunks(x, s, first), inputs, state)
  return (*pull(slopes), None)


by_kernel.defvjp(_forward, _backward)


def _call(
  inputs: Inputs, state: State, first: Array | None, interpret: bool
) -> tuple[Array, Array]:
  """The kernel over padded arrays, heads packed side by side."""
  batch, length, key_heads, width = inputs.key.shape
  heads, channels = inputs.value.shape[2:]
  if first is None:
    first = jnp.zeros((batch, length), bool)
  block = forward.CHUNKS * CHUNK
  pad = -length % block
  inputs = Inputs(*(pad_tokens(x, pad) for x in inputs))
  rows = rows_of(inputs, pad_tokens(first, pad))
  query, key, value = (
    x.reshape(*x.shape[:2], -1)
    for x in (inputs.query, inputs.key, inputs.value)
  )
  keys = KEY_HEADS if key_heads % KEY_HEADS == 0 else 1
  spec = forward.Spec(keys, inputs.repeats, width, channels)
  values = keys * spec.repeats
  by_key = pl.BlockSpec((1, block, keys * width), lambda b, h, c: (b, c, h))
  by_value = pl.BlockSpec(
    (1, block, values * channels), lambda b, h, c: (b, c, h)
  )
  by_row = pl.BlockSpec(
    (1, values, SUBLANES, block), lambda b, h, c: (b, h, 0, c)
  )
  columns = rows.reshape(batch, -1, values * SUBLANES, rows.shape[3])
  columns = jnp.swapaxes(columns, 2, 3)
  by_column = pl.BlockSpec(
    (1, 1, block, values * SUBLANES), lambda b, h, c: (b, h, c, 0)
  )
  states = pl.BlockSpec(
    (1, values, width, channels), lambda b, h, c: (b, h, 0, 0)
  )
  output, state = pl.pallas_call(
    functools.partial(forward.kernel, spec=spec),
    grid=(batch, key_heads // keys, (length + pad) // block),
    in_specs=[by_key, by_key, by_value, by_row, by_column, states],
    out_specs=[by_value, states],
    out_shape=[
      jax.ShapeDtypeStruct(value.shape, value.dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((values, width, channels), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='gated_delta_forward',
  )(query, key, value, rows, columns, state)
  output = output[:, :length].reshape(batch, length, heads, channels)
  return output.astype(jnp.float32), state
