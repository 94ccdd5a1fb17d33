"""Cross-entropy over a large vocabulary, in chunks of tokens, with z-loss.

    nll = lse - logit[target],  lse = log sum exp(x W)
    total = sum w (nll + z_loss lse^2) / sum w

with c tanh(x W / c) in place of x W where there is a softcap c.

Float32 logits of a whole batch would be the largest array of a run. Here they
exist for one chunk at a time, and since the loss is the end of the forward
pass, its gradient is made at once, while they do: three matmuls per chunk,
as without chunks, and none is computed twice.

With axis names, everything runs inside shard_map: tokens are split over
`token_axes`, the vocabulary over `vocab_axis`, and the matrix's width over
`width_axes`, along which it is gathered and its gradient scattered, once. As in
`embed.py`, the caller hands in the wrapper that does so.
"""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.embed import Shard
from gated_jax.ops.embed import unsharded

# Number of logits in one chunk whose size is not given.
CHUNK_ELEMENTS = 2**29
# Sums of exponentials between these are held by float32 and bfloat16, and so is
# every term that counts in one. For other sums there is a second attempt.
SUMS = 1e-30, 1e30
ATTEMPTS = 2


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """Static options."""

  chunk: int = 0  # tokens of one device; 0: by the size of the vocabulary
  z_loss: float = 0.0
  softcap: float = 0.0  # 0: there is none
  vocab_first: bool = False  # True: the matrix is [V, D], an embedding's
  shift: str = (
    'auto'  # of exponentials at first: 'zero', or the 'largest' logit
  )
  token_axes: tuple[str, ...] = ()
  vocab_axis: str = ''
  width_axes: tuple[str, ...] = ()


def softcapped(logits: Float[Array, '...'], c: float) -> Float[Array, '...']:
  """c tanh(logits / c), between -c and c; logits as they are where c is 0."""
  return c * jnp.tanh(logits / c) if c else logits


class LossSums(NamedTuple):
  """Means over the tokens by weight, and the sum of the weights."""

  total: Float[Array, '']  # the sum that training minimises
  nll: Float[Array, '']
  z: Float[Array, '']  # lse^2
  weight: Float[Array, '']


class Gradients(NamedTuple):
  """Gradients of `LossSums.total`."""

  x: Float[Array, 'B T D']
  matrix: Float[Array, 'D_V V_D']


def chunk_of(tokens: int, vocab: int, spec: LossSpec) -> int:
  """Tokens per chunk: spec.chunk or a power of two, at most all of them."""
  chunk = spec.chunk
  if not chunk:
    chunk = 1 << max(8, (CHUNK_ELEMENTS // vocab).bit_length() - 1)
  return min(chunk, tokens)


def local_loss(
  x: Float[Array, 'B T D'],
  matrix: Float[Array, 'A B2'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  spec: LossSpec,
  differentiate: bool,
  reduce: bool = True,
) -> tuple[LossSums, Gradients | None]:
  """The loss on one device's shard, and the gradients of `total`.

  Args:
    x: final hidden states, in the dtype of the matmuls.
    matrix: [D, V], or [V, D] with spec.vocab_first.
    targets: token ids, over the whole vocabulary.
    weights: each token's in the mean; 0: it does not count.
    spec: static options.
    differentiate: whether gradients are wanted.
    reduce: False: the matrix's gradient is that of this device's tokens, of the
      whole width and not rounded.
  """
  b, t, d = x.shape
  width_axis = 1 if spec.vocab_first else 0
  whole = matrix.astype(x.dtype)
  if spec.width_axes:
    whole = jax.lax.all_gather(
      whole, spec.width_axes, axis=width_axis, tiled=True
    )
  vocab = whole.shape[1 - width_axis]
  count = _sum(jnp.sum(weights, dtype=jnp.float32), spec.token_axes)
  tokens = b * t
  chunk = chunk_of(tokens, vocab, spec)
  chunks = -(-tokens // chunk)
  rows: tuple[Array, ...] = (
    x.reshape(tokens, d),
    targets.reshape(tokens),
    weights.reshape(tokens).astype(jnp.float32) / jnp.maximum(count, 1e-9),
  )
  rows = tuple(_pad(r, chunks * chunk) for r in rows)
  one = functools.partial(_one_chunk, whole, spec, differentiate)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  zero = jnp.zeros((), wide)
  # The first chunk reads nothing of it, so that nothing is cleared before.
  empty = jax.lax.empty(whole.shape, wide) if differentiate else zero
  start = (jnp.int32(0), zero, zero, empty)
  if chunks == 1:
    (_, nll, z, d_matrix), d_x = one(start, rows)
  else:
    (_, nll, z, d_matrix), d_x = jax.lax.scan(
      one, start, tuple(r.reshape(chunks, chunk, *r.shape[1:]) for r in rows)
    )
  nll, z = (_sum(value, spec.token_axes) for value in (nll, z))
  sums = LossSums(nll + spec.z_loss * z, nll, z, count)
  if not differentiate:
    return sums, None
  d_x = d_x.reshape(chunks * chunk, d)[:tokens].reshape(b, t, d)
  if spec.vocab_axis:
    d_x = jax.lax.psum(d_x, spec.vocab_axis)
  if not reduce:
    return sums, Gradients(d_x, d_matrix)
  if spec.width_axes:
    d_matrix = jax.lax.psum_scatter(
      d_matrix, spec.width_axes, scatter_dimension=width_axis, tiled=True
    )
  rest = tuple(a for a in spec.token_axes if a not in spec.width_axes)
  return sums, Gradients(d_x, _sum(d_matrix, rest).astype(matrix.dtype))


def _pad(x: Array, rows: int) -> Array:
  """x with zeros behind its rows."""
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _sum(x: Array, axes: tuple[str, ...]) -> Array:
  return jax.lax.psum(x, axes) if axes else x


class _Row(NamedTuple):
  """What the logits of a chunk's tokens come to, on one device."""

  shift: Float[Array, ' C']
  total: Float[Array, ' C']  # sum over V of exp(logits - shift)
  target: Float[Array, ' C']  # the logit of the target; 0 if it lies elsewhere


def _one_chunk(
  matrix: Array,
  spec: LossSpec,
  differentiate: bool,
  carry: tuple[Array, Array, Array, Array],
  rows: tuple[Array, ...],
) -> tuple[tuple[Array, Array, Array, Array], Any]:
  """Adds one chunk's losses and the matrix's gradient to the carry.

  Args:
    matrix: whole along its width.
    spec: static options.
    differentiate: whether gradients are wanted.
    carry: the chunk's number, and the sums of those before.
    rows: x, targets and weights of the chunk.

  Returns:
    The carry, and the gradient of the chunk's x where it is wanted.
  """
  x, targets, weights = rows
  number, nll_sum, z_sum, d_matrix = carry
  wide = jnp.promote_types(x.dtype, jnp.float32)
  vocab = 0 if spec.vocab_first else 1
  first = jnp.int32(0)
  if spec.vocab_axis:
    first = jax.lax.axis_index(spec.vocab_axis) * matrix.shape[vocab]
  hit = jnp.arange(matrix.shape[vocab]) + first == targets[:, None]
  terms, row = _exponentials(x, matrix, hit, spec)
  top, total, target = row
  if spec.vocab_axis:
    top = jax.lax.pmax(row.shift, spec.vocab_axis)
    total *= jnp.exp(row.shift - top)
    total, target = jax.lax.psum((total, target), spec.vocab_axis)
  lse = jnp.log(total) + top
  nll_sum += jnp.sum((lse - target) * weights)
  z_sum += jnp.sum(lse**2 * weights)
  if not differentiate:
    return (number + 1, nll_sum, z_sum, d_matrix), None
  # d total / d logits = w (softmax (1 + 2 z_loss lse) - one_hot)
  scale = weights * (1 + 2 * spec.z_loss * lse)
  d_logits = terms * (scale * jnp.exp(row.shift - lse))[:, None]
  # Of a target that is certain almost nothing is left: no rounded term will do.
  d_target = scale * jnp.exp(target - lse) - weights
  d_logits = jnp.where(hit, d_target[:, None], d_logits)
  if spec.softcap:
    share = jnp.log(terms.astype(wide)) + row.shift[:, None]
    share = jnp.where(hit, target[:, None], share) / spec.softcap
    d_logits *= 1 - jnp.clip(share, -1, 1) ** 2
  d_logits = d_logits.astype(x.dtype)
  d_x = jax.lax.dot_general(
    d_logits, matrix, (((1,), (vocab,)), ((), ())), preferred_element_type=wide
  )
  pair = (d_logits, x) if spec.vocab_first else (x, d_logits)
  d_matrix = jnp.where(number, d_matrix, 0) + jax.lax.dot_general(
    *pair, (((0,), (0,)), ((), ())), preferred_element_type=wide
  )
  return (number + 1, nll_sum, z_sum, d_matrix), d_x.astype(x.dtype)


def _exponentials(
  x: Float[Array, 'C D'],
  matrix: Array,
  hit: Bool[Array, 'C V'],
  spec: LossSpec,
) -> tuple[Float[Array, 'C V'], _Row]:
  """exp(logits - shift), as precise as gradients are, and what they sum up to.

  A TPU's products have an epilogue that adds up, if the shift is known before.
  Elsewhere they have none, and the largest logit comes first.
  """
  ways = {
    'zero': functools.partial(_shifted_if_need_be, spec),
    'largest': functools.partial(_shifted_by_largest, spec),
  }
  if spec.shift != 'auto':
    return ways[spec.shift](x, matrix, hit)
  return jax.lax.platform_dependent(
    x, matrix, hit, tpu=ways['zero'], default=ways['largest']
  )


def _logits(spec: LossSpec, x: Array, matrix: Array) -> Float[Array, 'C V']:
  width = 1 if spec.vocab_first else 0
  logits = jax.lax.dot_general(
    x,
    matrix,
    (((1,), (width,)), ((), ())),
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )
  return softcapped(logits, spec.softcap)


def _kept(dtype: jnp.dtype) -> Any:
  """The dtype of exponentials: float16, for one, would not hold them."""
  return jnp.bfloat16 if dtype.itemsize == 2 else dtype


def _sums(
  logits: Float[Array, 'C V'],
  shift: Float[Array, ' C'],
  hit: Bool[Array, 'C V'],
  dtype: jnp.dtype,
) -> tuple[Float[Array, 'C V'], _Row]:
  """The exponentials, and their sums. `dtype` is that of the model."""
  terms = jnp.exp(logits - shift[:, None])
  total = jnp.sum(terms, axis=1)
  target = jnp.sum(jnp.where(hit, logits, 0.0), axis=1)
  return terms.astype(_kept(dtype)), _Row(shift, total, target)


def _shifted_by_largest(
  spec: LossSpec, x: Array, matrix: Array, hit: Array
) -> tuple[Float[Array, 'C V'], _Row]:
  logits = _logits(spec, x, matrix)
  return _sums(logits, jnp.max(logits, axis=1), hit, x.dtype)


def _shifted_if_need_be(
  spec: LossSpec, x: Array, matrix: Array, hit: Array
) -> tuple[Float[Array, 'C V'], _Row]:
  """By 0; logits are never written then, as sums are made with the product.

  Only where a sum cannot be held, all is done once more, with the largest logit
  as the shift of such a token. A sum that is not a number stays what it is.
  """

  def attempt(
    state: tuple[Array, Array, tuple[Array, _Row]],
  ) -> tuple[Array, Array, tuple[Array, _Row]]:
    number, shift, _ = state
    logits = _logits(spec, x, matrix)
    terms, row = _sums(logits, shift, hit, x.dtype)
    held = (SUMS[0] < row.total) & (row.total < SUMS[1])
    number = jnp.where(jnp.all(held), ATTEMPTS, number + 1)
    shift = jnp.where(held, shift, jnp.max(logits, axis=1))
    return number, shift, (terms, row)

  zeros = jnp.zeros(x.shape[0], jnp.promote_types(x.dtype, jnp.float32))
  nothing = jax.lax.empty(hit.shape, _kept(x.dtype))
  start = jnp.int32(0), zeros, (nothing, _Row(zeros, zeros, zeros))
  _, _, result = jax.lax.while_loop(
    lambda state: state[0] < ATTEMPTS, attempt, start
  )
  return result


def cross_entropy(
  x: Float[Array, 'B T D'],
  matrix: Float[Array, 'A B2'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  spec: LossSpec = LossSpec(),
  shard: Shard = unsharded,
  inlet: Float[Array, 'b t V D'] | None = None,
) -> LossSums:
  """Loss of a batch; only `total` has a gradient, with respect to x, matrix.

  Args:
    x: [B, T, D], in the dtype of the matmuls.
    matrix: [D, V], or [V, D] with spec.vocab_first; cast to x's dtype.
    targets: token ids below V.
    weights: each token's in the mean.
    spec: static options.
    shard: runs a function of (x, matrix, targets, weights) on each device's
      shard; its second argument says whether it returns gradients too.
    inlet: of the matrix where it is an embedding's (`embed.py`), which then
      gets the matrix's gradient, as [1, 1, V, D] of each device.
  """
  return _cross_entropy(spec, shard, x, matrix, targets, weights, inlet)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
  spec: LossSpec,
  shard: Shard,
  x: Array,
  matrix: Array,
  targets: Array,
  weights: Array,
  inlet: Array | None,
) -> LossSums:
  del inlet

  def run(
    x: Array, matrix: Array, targets: Array, weights: Array
  ) -> tuple[Array, ...]:
    """Each device's share of the sums."""
    return tuple(local_loss(x, matrix, targets, weights, spec, False)[0])

  return LossSums(*shard(run, False)(x, matrix, targets, weights))


def _forward(
  spec: LossSpec,
  shard: Shard,
  x: Array,
  matrix: Array,
  targets: Array,
  weights: Array,
  inlet: Array | None,
) -> tuple[LossSums, tuple[Array, Array | None, Array | None]]:
  def run(
    x: Array, matrix: Array, targets: Array, weights: Array
  ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Each device's share of the sums, and their gradients."""
    sums, gradients = local_loss(
      x, matrix, targets, weights, spec, True, inlet is None
    )
    assert gradients is not None
    d_x, d_matrix = gradients
    if inlet is not None:
      d_matrix = d_matrix[None, None].astype(inlet.dtype)
    return tuple(sums), (d_x, d_matrix)

  sums, gradients = shard(run, True)(x, matrix, targets, weights)
  d_x, d_matrix = gradients
  if inlet is None:
    return LossSums(*sums), (d_x, d_matrix, None)
  return LossSums(*sums), (d_x, None, d_matrix)


def _backward(
  spec: LossSpec,
  shard: Shard,
  gradients: tuple[Array, Array | None, Array | None],
  incoming: LossSums,
) -> tuple[Array, Array | None, None, None, Array | None]:
  del spec, shard
  d_x, d_matrix, d_inlet = jax.tree.map(
    lambda g: (g * incoming.total).astype(g.dtype), gradients
  )
  return d_x, d_matrix, None, None, d_inlet


_cross_entropy.defvjp(_forward, _backward)
