"""SwiGLU experts on rows that are sorted by expert."""

import dataclasses
from typing import NamedTuple
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops import swiglu as ops
from gated_jax.ops.moe import swiglu_tpu
from gated_jax.ops.moe.grouped_matmul import grouped_matmul
from gated_jax.ops.moe.grouped_matmul import resolve

# Names of arrays that a remat policy may save: rows as a device received them,
# in the order of its experts, and the product of those rows with gate_proj and
# up.
ROWS_NAME = 'expert_rows'
PRODUCT_NAME = 'expert_product'

T = TypeVar('T')


class ExpertWeights(NamedTuple):
  """SwiGLU experts, stacked. Inside shard_map: this device's part."""

  gate_proj: Float[Array, 'E D F']
  up: Float[Array, 'E D F']
  down: Float[Array, 'E F D']
  scale: Float[Array, ' D'] | None = None  # of all outputs; see `normed`


class Matrices(NamedTuple):
  """The same as grouped matmuls take them: gate_proj and up, joined or apart.

  Side by side in one array they take one pass over the rows instead of two, and
  in backward there is no sum of two gradients of the rows, which is an array k
  times as large as the tokens. To join them is a copy of all experts, which is
  dear where few tokens are multiplied.

  Where devices share D they had better be made of each device's shards, and
  gathered then: shards are small. JAX's kernel takes `down` with D before F, as
  a TPU gathers in place along any axis but the last.
  """

  into: tuple[Float[Array, 'E D F'], ...]
  down: Float[Array, 'E F D']  # for 'gmm' [E, D, F]
  scale: Float[Array, ' D'] | None = None

  @classmethod
  def of(cls, experts: ExpertWeights, implementation: str) -> 'Matrices':
    """Those of the experts, for an implementation of the grouped matmul."""
    name = resolve(implementation)
    into: tuple[Array, ...] = (experts.gate_proj, experts.up)
    if name != 'tiles':
      into = (jnp.concatenate(into, axis=-1),)
    down = experts.down.swapaxes(1, 2) if name == 'gmm' else experts.down
    return cls(into, down, experts.scale)

  @staticmethod
  def axes(
    stored: tuple[tuple[T, ...], ...], implementation: str
  ) -> tuple[tuple[T, ...], ...]:
    """Names of the axes of `into` and `down`, by those of the experts'."""
    name = resolve(implementation)
    gate_proj, up, (e, f, d) = stored
    into = (gate_proj, up) if name == 'tiles' else (gate_proj,)
    return (*into, (e, d, f) if name == 'gmm' else (e, f, d))


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
  """Static options of `apply_experts`.

  Collectives need the names of the axes that they go over, so the caller's
  shard_map hands them in; nothing else is known of a mesh.
  """

  implementation: str = 'auto'  # see grouped_matmul.py
  interpret: bool = False  # runs 'gmm' on a CPU, for tests
  limit: float = 0.0  # of SwiGLU's factors; see gated_jax/ops/swiglu.py
  norm_eps: float = 1e-6  # of the outputs' norm, where the experts have one
  # Rows of an exchange buffer over the mean. A larger buffer seldom needs a
  # further round; a smaller one sends fewer padded bytes.
  slack: float = 1.0625
  # Parts that a device's tokens are worked through in, where experts are split
  # over devices: rows of one travel while those of another are multiplied.
  chunks: int = 1
  # Which of the arrays named above the backward pass of an exchange is given.
  # It makes the others again, and sends rows again for that.
  saved: tuple[str, ...] = ()
  # Axis names inside shard_map; '' and () where there are none.
  expert_axis: str = ''  # splits the experts, and the tokens as well
  token_axes: tuple[str, ...] = ()  # all that split tokens, expert_axis too
  tensor_axis: str = ''  # splits F


def swiglu(
  rows: Float[Array, 'R D'],
  weights: Float[Array, 'R 1'],
  matrices: Matrices,
  sizes: Int[Array, ' E'],
  spec: ExpertSpec,
) -> Float[Array, 'R D']:
  """weight * down(silu(gate_proj x) * up x) of rows sorted by expert.

  Rows past the last group come out as anything, as the kernel leaves them:
  nobody may read them. The mask keeps them from the gradients.

  Args:
    rows: sizes[e] of them for each expert.
    weights: one for each row.
    matrices: the experts.
    sizes: as above.
    spec: static options.
  """
  both = first_product(rows, matrices.into, sizes, spec)
  out = matrices.down, matrices.scale
  return second_product(both, weights, out, sizes, spec)


def first_product(
  rows: Float[Array, 'R D'],
  into: tuple[Float[Array, 'E D F'], ...],
  sizes: Int[Array, ' E'],
  spec: ExpertSpec,
  start: tuple[Float[Array, 'E D F'], ...] | None = None,
) -> Float[Array, 'R F2']:
  """gate_proj x and up x side by side.

  Args:
    rows: as in `swiglu`, like the rest.
    into: the experts' matrices of both.
    sizes: as above.
    spec: static options.
    start: what the gradient of `into` is added to, that of earlier rows.
  """
  options = (spec.implementation, spec.interpret)
  parts = [
    grouped_matmul(rows, matrices, sizes, *options, earlier)
    for matrices, earlier in zip(
      into, start or (None,) * len(into), strict=True
    )
  ]
  both = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
  return checkpoint_name(both, PRODUCT_NAME)


def second_product(
  both: Float[Array, 'R F2'],
  weights: Float[Array, 'R 1'],
  out: tuple[Float[Array, 'E F D'], Float[Array, ' D'] | None],
  sizes: Int[Array, ' E'],
  spec: ExpertSpec,
  start: Float[Array, 'E F D'] | None = None,
) -> Float[Array, 'R D']:
  """The experts' outputs, of what `first_product` gives.

  Args:
    both: gate_proj x and up x.
    weights: as in `swiglu`, like the rest.
    out: the experts' matrices, and the scale of the norm behind them.
    sizes: as above.
    spec: static options.
    start: what the gradient of the matrices is added to, that of earlier rows.
  """
  down, scale = out
  used = sizes.sum()
  # A norm would take factors before it away.
  before = weights if scale is None else jnp.ones_like(weights)
  by_kernel = resolve(spec.implementation) == 'gmm'
  if by_kernel and swiglu_tpu.fits(both.shape):
    hidden = swiglu_tpu.hidden(both, before, used, spec.limit, spec.interpret)
  else:
    # Split before widening: in the other order XLA writes a float32 copy.
    halves = jnp.split(both, 2, axis=-1)
    gate, up = (half.astype(before.dtype) for half in halves)
    product = ops.hidden(gate, up, spec.limit) * before
    hidden = _first_rows(product, used).astype(both.dtype)
  options = (spec.implementation, spec.interpret)
  y = grouped_matmul(hidden, down, sizes, *options, start, turned=by_kernel)
  if scale is None:
    return y
  return (normed(y, scale, used, spec) * weights).astype(y.dtype)


def _first_rows(
  x: Float[Array, 'R D'], used: Int[Array, '']
) -> Float[Array, 'R D']:
  """The rows that belong to an expert, and zeros in place of the others."""
  inside = (jnp.arange(x.shape[0]) < used)[:, None]
  return jnp.where(inside, x, 0)


def normed(
  y: Float[Array, 'R D'],
  scale: Float[Array, ' D'],
  used: Int[Array, ''],
  spec: ExpertSpec,
) -> Float[Array, 'R D']:
  """RMSNorm of y * scale, row by row: the scale turns rows and no more.

  Where devices share the hidden channels each has a part of every sum in y, so
  that the parts are added up before anything is squared.

  Args:
    y: outputs of the experts, sorted by expert.
    scale: one for all experts.
    used: how many rows belong to an expert; the others come out as zeros.
    spec: static options.
  """
  y = _first_rows(y, used)
  if spec.tensor_axis:
    y = jax.lax.psum(y, spec.tensor_axis)
  wide = y.astype(scale.dtype) * scale
  mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
  return wide * jax.lax.rsqrt(mean + spec.norm_eps)
