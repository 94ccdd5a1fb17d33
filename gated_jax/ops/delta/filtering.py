"""The way of queries, keys and values to the rule: filter, SiLU, norm.

    z = filter(x)      a = silu(z)      out = a,  or  scale a / |a| by head

In plain arrays as it stands here, or in one pass by a TPU kernel
(`pallas_tpu/filters.py`), wherever the rule itself is computed by one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.chips import LANES
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.chunks import pad_tokens
from gated_jax.ops.delta.convolution import convolve
from gated_jax.ops.delta.norm import normalize
from gated_jax.ops.delta.pallas_tpu.filters import HALO
from gated_jax.ops.delta.pallas_tpu.filters import PIECE
from gated_jax.ops.delta.pallas_tpu.filters import FilterSpec
from gated_jax.ops.delta.pallas_tpu.filters import filter_heads
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES


def filtered_heads(
  x: Float[Array, 'B T N H'],
  filters: Float[Array, 'W N H'],
  before: tuple[Float[Array, 'B I N H'] | None, Bool[Array, 'B T'] | None],
  scale: float = 0.0,
  implementation: str = 'auto',
) -> Float[Array, 'B T N H']:
  """Filtered heads, in the dtype of x.

  Args:
    x: inputs.
    filters: of each channel; the last weight is that of the token itself.
    before: the W - 1 inputs before x, None: zeros; and True at the first token
      of a document, None: nowhere.
    scale: length that each head's vector gets; 0: its own.
    implementation: of the rule.
  """
  one = x.shape[1] == 1
  if not one and rule.takes_kernels(implementation, refusal(x, filters)):
    return by_kernel(x, filters, before, scale)
  y = jax.nn.silu(convolve(x, filters, *before))
  return (normalize(y, scale) if scale else y).astype(x.dtype)


def refusal(x: Float[Array, 'B T N H'], filters: Float[Array, 'W N H']) -> str:
  """The reason why the kernel cannot do this; '' where it can."""
  if x.shape[3] % LANES:
    return f'heads of {x.shape[3]} channels are no whole {LANES}'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'arrays are {x.dtype}'
  if filters.shape[0] > SUBLANES:
    return f'filters of {filters.shape[0]} inputs are wider than {SUBLANES}'
  return ''


def by_kernel(
  x: Float[Array, 'B T N H'],
  filters: Float[Array, 'W N H'],
  before: tuple[Float[Array, 'B I N H'] | None, Bool[Array, 'B T'] | None],
  scale: float = 0.0,
  interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """The same in one pass of a kernel; see `filtered_heads`."""
  history, first = before
  batch, length, heads, width = x.shape
  taps = filters.shape[0]
  # Row j of the weights is that of the input j tokens before.
  weights = filters[::-1].reshape(taps, -1).astype(jnp.float32)
  weights = jnp.pad(weights, [(0, SUBLANES - taps), (0, 0)])
  pad = -length % PIECE
  flat = pad_tokens(x.reshape(batch, length, -1), pad)
  if history is None:
    rows = jnp.zeros((batch, HALO, heads * width), x.dtype)
  else:
    rows = history.astype(x.dtype).reshape(batch, taps - 1, -1)
    rows = jnp.pad(rows, [(0, 0), (HALO - taps + 1, 0), (0, 0)])
  age = None if first is None else _age(pad_tokens(first, pad), taps)
  spec = FilterSpec(width, taps, scale)
  y = filter_heads(flat, weights, rows, age, spec, interpret)
  return y[:, :length].reshape(x.shape)


def _age(first: Bool[Array, 'B T'], most: int) -> Int[Array, 'B T']:
  """Inputs before each token that are of its document, at least `most`."""
  token = jnp.arange(first.shape[1], dtype=jnp.int32)
  begin = jax.lax.cummax(jnp.where(first, token, -most), axis=1)
  return token - begin
