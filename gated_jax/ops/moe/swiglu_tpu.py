"""SwiGLU between the two grouped products, in one pass: a TPU kernel.

    hidden = weight * silu(gate) * up

Gate and up lie side by side, as one product writes them. XLA makes the gradient
of either half by itself, and joins them in another pass over memory; here one
pass reads both halves and one writes both. Rows past the last group may hold
anything, and come out as zeros.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.chips import LANES
from gated_jax.ops import swiglu
from gated_jax.ops.tpu_rows import SMALLEST
from gated_jax.ops.tpu_rows import rows_of_block

# Elements of gate and up together that one step of the grid takes; in float32,
# with both gradients, these are a few MiB.
ELEMENTS = 1 << 19


@dataclasses.dataclass(frozen=True)
class _KernelSpec:
  """Static options of one call."""

  rows: int  # number of rows of a block
  limit: float
  interpret: bool


def fits(shape: tuple[int, ...]) -> bool:
  """True where the kernel can do this.

  Args:
    shape: [R, 2 F] of gate and up, side by side.
  """
  rows, width = shape
  return width % (2 * LANES) == 0 and _block(rows, width) >= SMALLEST


def _block(rows: int, width: int) -> int:
  """Rows of a block, all columns of a row together."""
  return rows_of_block(rows, ELEMENTS // width)


def hidden(
  both: Float[Array, 'R F2'],
  weights: Float[Array, 'R 1'],
  used: Int[Array, ''],
  limit: float = 0.0,
  interpret: bool = False,
) -> Float[Array, 'R F']:
  """The hidden activations of experts, where `fits` allows it.

  Args:
    both: gate and up, side by side.
    weights: one for each row; the product is made in their dtype.
    used: rows that belong to an expert; they come first.
    limit: of both factors; see gated_jax/ops/swiglu.py.
    interpret: run without a TPU, slowly.
  """
  spec = _KernelSpec(_block(*both.shape), limit, interpret)
  return _hidden(spec, both, weights, used.reshape(1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden(
  spec: _KernelSpec, both: Array, weights: Array, used: Array
) -> Array:
  rows, width = both.shape
  shape = jax.ShapeDtypeStruct((rows, width // 2), both.dtype)
  return _run(spec, _forward_kernel, used, [both, weights], [shape])[0]


def _forward(
  spec: _KernelSpec, both: Array, weights: Array, used: Array
) -> tuple[Array, tuple[Array, ...]]:
  return _hidden(spec, both, weights, used), (both, weights, used)


def _backward(
  spec: _KernelSpec, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, None]:
  both, weights, used = saved
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (both, weights)]
  arrays = [both, weights, grad]
  d_both, d_weights = _run(spec, _backward_kernel, used, arrays, shapes)
  return d_both, d_weights, None


_hidden.defvjp(_forward, _backward)


def _run(
  spec: _KernelSpec,
  kernel: Callable[..., None],
  used: Array,
  arrays: list[Array],
  shapes: list[jax.ShapeDtypeStruct],
) -> list[Array]:
  """One kernel over blocks of rows."""

  def block(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """A block of rows, all columns of them."""
    return pl.BlockSpec((spec.rows, x.shape[1]), lambda i, used: (i, 0))

  backward = kernel is _backward_kernel
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    return pl.pallas_call(
      functools.partial(kernel, spec=spec),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(arrays[0].shape[0] // spec.rows,),
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in shapes],
      ),
      out_shape=shapes,
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      cost_estimate=pl.CostEstimate(
        flops=0,
        transcendentals=arrays[0].size // 2,
        bytes_accessed=_bytes(arrays) + _bytes(shapes),
      ),
      interpret=spec.interpret,
      name='expert_swiglu_backward' if backward else 'expert_swiglu_forward',
    )(used, *arrays)


def _bytes(arrays: Sequence[Any]) -> int:
  return sum(x.size * x.dtype.itemsize for x in arrays)


def _inside(used: Any, spec: _KernelSpec) -> Array:
  """[rows, 1]: which rows of this step's block belong to an expert."""
  row = jax.lax.broadcasted_iota(jnp.int32, (spec.rows, 1), 0)
  return row + pl.program_id(0) * spec.rows < used[0]


def _halves(both: Any, dtype: Any) -> tuple[Array, Array]:
  """Gate and up of a block."""
  width = both.shape[1] // 2
  return both[:, :width].astype(dtype), both[:, width:].astype(dtype)


def _forward_kernel(
  used: Any, both: Any, weights: Any, out: Any, *, spec: _KernelSpec
) -> None:
  """Writes the hidden activations of a block of rows."""
  gate, up = _halves(both, weights.dtype)
  product = swiglu.hidden(gate, up, spec.limit) * weights[...]
  out[...] = jnp.where(_inside(used, spec), product, 0).astype(out.dtype)


def _backward_kernel(
  used: Any,
  both: Any,
  weights: Any,
  grad: Any,
  d_both: Any,
  d_weights: Any,
  *,
  spec: _KernelSpec,
) -> None:
  """Writes the gradients of a block of rows."""
  gate, up = _halves(both, weights.dtype)
  product, pull = jax.vjp(
    lambda gate, up: swiglu.hidden(gate, up, spec.limit), gate, up
  )
  inside = _inside(used, spec)
  d = jnp.where(inside, grad[...].astype(weights.dtype), 0)
  sums = jnp.sum(d * jnp.where(inside, product, 0), axis=1, keepdims=True)
  d_weights[...] = sums
  width = both.shape[1] // 2
  for half, gradient in enumerate(pull(d * weights[...])):
    gradient = jnp.where(inside, gradient, 0).astype(d_both.dtype)
    d_both[:, half * width : (half + 1) * width] = gradient
