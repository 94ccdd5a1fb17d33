"""Mixture of experts as functions on arrays: no token is ever dropped.

    p = softmax(x W_r)                     the router, in float32
    y = sum over the top k experts e of p_e * down_e(silu(gate_e x) * up_e x)

`route` chooses, `apply_experts` computes: (token, expert) pairs are sorted
by expert and go through one grouped matmul per projection. The weight p_e is
multiplied into the hidden activations, before `down`, which is linear: so
the backward pass never needs the experts' outputs again.

With experts split over devices, `apply_experts` runs inside `shard_map` and
is told axis names. Pairs travel by all-to-all in buffers of a fixed size, in
as many rounds as the fullest pair of devices needs: one round while the load
is even (`ExpertSpec.slack` above the mean), more when it is not. So nothing
is dropped, memory stays bounded, and no platform needs ragged collectives.
The loop is written with its own backward pass, which runs the same rounds
and recomputes them. `gated_jax/model/moe.py` owns the parameters.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int


class Routing(NamedTuple):
  """What the router says about every token."""

  logits: Float[Array, '*b E']  # float32, as the probabilities
  probabilities: Float[Array, '*b E']
  indices: Int[Array, '*b k']  # chosen experts, dearest first
  weights: Float[Array, '*b k']  # what each one's output is multiplied by


class Statistics(NamedTuple):
  """Scalars over all tokens that count."""

  balance: Float[Array, '']  # E sum_e f_e P_e: 1 where the load is even
  router_z: Float[Array, '']  # mean squared log-partition of the router
  max_load: Float[Array, '']  # the fullest expert's choices over the mean
  idle_experts: Float[Array, '']  # share of experts that no token chose


class ExpertWeights(NamedTuple):
  """SwiGLU experts, stacked. Inside shard_map: this device's part."""

  gate_proj: Float[Array, 'E D F']
  up: Float[Array, 'E D F']
  down: Float[Array, 'E F D']


class _Matrices(NamedTuple):
  """The same for two grouped matmuls: gate_proj and up side by side.

  One pass over the rows instead of two, and in backward no sum of two
  gradients of the rows, which is an array k times as large as the tokens.
  """

  into: Float[Array, 'E D F2']
  down: Float[Array, 'E F D']


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
  """Static options of `apply_experts`.

  'gmm' is JAX's grouped-matmul kernel for TPU. It is the automatic choice
  there: the compiler turns the weight gradient of `ragged_dot` into a dense
  matmul of every expert with every row, E times the work.
  """

  implementation: str = 'auto'  # or 'ragged_dot', 'gmm'
  interpret: bool = False  # runs 'gmm' on a CPU, for tests
  # Rows of an exchange buffer over the mean. More: seldom a second round;
  # less: fewer padded bytes on the wire.
  slack: float = 1.25
  # Axis names inside shard_map; '' and () where there are none.
  expert_axis: str = ''  # splits the experts, and the tokens as well
  token_axes: tuple[str, ...] = ()  # all that split tokens, expert_axis too
  tensor_axis: str = ''  # splits F


def route(
  x: Float[Array, '*b D'],
  kernel: Float[Array, 'D E'],
  top_k: int,
  normalize: bool = True,
) -> Routing:
  """Softmax over the experts, then the k most probable; ties go to the first.

  Args:
    x: tokens.
    kernel: the router. Its matmul takes float32 at full precision on every
      platform: rounding here flips choices.
    top_k: experts per token.
    normalize: whether the k weights are made to sum to one.
  """
  experts = kernel.shape[-1]
  if not 0 < top_k <= experts:
    raise ValueError(f'{top_k=} must lie between 1 and {experts} experts')
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum(
    '...D,DE->...E',
    x.astype(dtype),
    kernel.astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  probabilities = jax.nn.softmax(logits, axis=-1)
  weights, indices = jax.lax.top_k(probabilities, top_k)
  if normalize:
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
  return Routing(logits, probabilities, indices, weights)


def router_statistics(
  routing: Routing,
  valid: Bool[Array, '*b'] | None = None,
  axes: tuple[str, ...] = (),
) -> Statistics:
  """Losses and load over the whole batch, not each device's part of it.

  Balance is E sum_e f_e P_e with f_e the share of all choices that fell on e
  and P_e its mean probability, both over the global batch (arXiv 2501.11873).
  Under jit a sum over a sharded axis is global already; inside shard_map
  `axes` names the mesh axes that split the tokens.

  Args:
    routing: from `route`.
    valid: tokens that count; None: all.
    axes: as above.
  """
  experts, top_k = routing.logits.shape[-1], routing.indices.shape[-1]
  dtype = routing.logits.dtype
  chosen = jax.nn.one_hot(routing.indices, experts, dtype=dtype).sum(-2)
  log_partition = jax.nn.logsumexp(routing.logits, axis=-1)
  if valid is None:
    valid = jnp.ones(log_partition.shape, bool)
  keep = valid.astype(dtype)

  def total(values):
    values = values * keep.reshape(
      keep.shape + (1,) * (values.ndim - keep.ndim)
    )
    values = values.sum(tuple(range(keep.ndim)))
    return jax.lax.psum(values, axes) if axes else values

  tokens = jnp.maximum(total(jnp.ones_like(keep)), 1)
  load = jax.lax.stop_gradient(total(chosen)) / (tokens * top_k)
  mean_probability = total(routing.probabilities) / tokens
  return Statistics(
    balance=experts * jnp.sum(load * mean_probability),
    router_z=total(log_partition**2) / tokens,
    max_load=experts * jnp.max(load),
    idle_experts=jnp.mean((load == 0).astype(dtype)),
  )


def apply_experts(
  x: Float[Array, 'B T D'],
  indices: Int[Array, 'B T k'],
  weights: Float[Array, 'B T k'],
  experts: ExpertWeights,
  spec: ExpertSpec = ExpertSpec(),
) -> Float[Array, 'B T D']:
  """Each token through the experts chosen for it, summed by weight.

  Args:
    x: tokens, in the dtype of the matmuls.
    indices: experts of each token, numbered over all devices.
    weights: one per choice.
    experts: in the dtype of the matmuls.
    spec: static options; with axis names the call stands inside shard_map.
  """
  b, t, d = x.shape
  k = indices.shape[-1]
  flat = x.reshape(b * t, d)
  choices = indices.reshape(b * t, k).astype(jnp.int32)
  weights = weights.reshape(b * t, k)
  matrices = _Matrices(
    jnp.concatenate((experts.gate_proj, experts.up), axis=-1), experts.down
  )
  if spec.expert_axis:
    y = _exchange(flat, weights, choices, matrices, spec)
  else:
    y = _local(flat, weights, choices, matrices, spec)
  if spec.tensor_axis:
    y = jax.lax.psum(y, spec.tensor_axis)
  return y.reshape(b, t, d)


@jax.custom_vjp
def spread(
  x: Float[Array, 'M D'], choice: Int[Array, ' R'], slot: Int[Array, 'M k']
) -> Float[Array, 'R D']:
  """Row r is the token of choice[r]; the transpose of `collect`.

  `choice` and `slot` are inverse to one another: slot[m, j] is the row that
  choice m * k + j sits in, or R or more if it has none. A row that no choice
  sits in holds some token, and whoever reads rows knows which those are.
  Both directions are gathers: scatters are slow on TPU.
  """
  return jnp.take(x, choice // slot.shape[1], axis=0, mode='clip')


@jax.custom_vjp
def collect(
  rows: Float[Array, 'R D'], choice: Int[Array, ' R'], slot: Int[Array, 'M k']
) -> Float[Array, 'M D']:
  """Sums each token's rows, in float32; the transpose of `spread`."""
  del choice
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  tokens, k = slot.shape
  found = jnp.take(rows, slot.T.reshape(-1), axis=0, mode='clip')
  total = jnp.zeros((), dtype)
  # One sum of k arrays: a sum over an axis of k would be made within a TPU's
  # tiles, of a float32 copy.
  for j in range(k):
    part = found[j * tokens : (j + 1) * tokens].astype(dtype)
    total += jnp.where((slot[:, j] < rows.shape[0])[:, None], part, 0)
  return total.astype(rows.dtype)


@jax.custom_vjp
def permute(
  rows: Float[Array, 'R D'], order: Int[Array, ' R'], rank: Int[Array, ' R']
) -> Float[Array, 'R D']:
  """rows[order]; `rank` is the inverse, for the way back."""
  del rank
  return jnp.take(rows, order, axis=0, mode='clip')


permute.defvjp(
  lambda rows, order, rank: (permute(rows, order, rank), (order, rank)),
  lambda saved, grad: (permute(grad, saved[1], saved[0]), None, None),
)
spread.defvjp(
  lambda x, choice, slot: (spread(x, choice, slot), (choice, slot)),
  lambda saved, grad: (collect(grad, *saved), None, None),
)
collect.defvjp(
  lambda rows, choice, slot: (collect(rows, choice, slot), (choice, slot)),
  lambda saved, grad: (spread(grad, *saved), None, None),
)


def _ordered(keys: Int[Array, ' n']) -> tuple[Array, Array]:
  """A stable sort and its inverse: order[rank[i]] == i."""
  order = jnp.argsort(keys, stable=True).astype(jnp.int32)
  return order, jnp.argsort(order).astype(jnp.int32)


def _counts(ids: Int[Array, ' n'], size: int) -> Int[Array, ' size']:
  hits = ids[:, None] == jnp.arange(size, dtype=ids.dtype)
  return hits.sum(0, dtype=jnp.int32)


def _row_tile(spec: ExpertSpec, rows: int) -> int:
  """Rows that the kernel takes at once; every buffer is a multiple."""
  if _implementation(spec) != 'gmm':
    return 1
  return 512 if rows >= 4096 else 128


def _implementation(spec: ExpertSpec) -> str:
  if spec.implementation != 'auto':
    return spec.implementation
  return 'gmm' if jax.default_backend() == 'tpu' else 'ragged_dot'


def check_platform(implementation: str, platform: str) -> None:
  """NotImplementedError where a grouped matmul cannot run."""
  if implementation == 'gmm' and platform != 'tpu':
    raise NotImplementedError(
      f'moe.implementation={implementation!r} needs a TPU and this is a '
      f'{platform}'
    )


def _tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
  """Tiles of the grouped matmul: as wide as VMEM takes beside two buffers."""

  def widest(size: int, most: int) -> int:
    parts = -(-size // most)
    return min(size, -(-size // parts // 128) * 128)

  return (512 if m % 512 == 0 else 128, widest(k, 1024), widest(n, 1024))


def _grouped_matmul(rows, weights, sizes, spec: ExpertSpec):
  name = _implementation(spec)
  if name == 'ragged_dot':
    return jax.lax.ragged_dot(
      rows, weights, sizes, preferred_element_type=rows.dtype
    )
  if name == 'gmm':
    return megablox.gmm(
      rows, weights, sizes, rows.dtype, _tiling, interpret=spec.interpret
    )
  raise ValueError(f'implementation={name!r} must be auto, ragged_dot or gmm')


def _expert_mlp(
  rows: Float[Array, 'R D'],
  weights: Float[Array, 'R 1'],
  matrices: _Matrices,
  sizes: Int[Array, ' E'],
  spec: ExpertSpec,
) -> Float[Array, 'R D']:
  """SwiGLU of rows sorted by expert, sizes[e] of them each.

  Rows past the last group come out as anything, as the kernel leaves them:
  nobody may read them. The mask keeps them from the gradients.
  """
  dtype = weights.dtype
  used = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
  both = _grouped_matmul(rows, matrices.into, sizes, spec)
  # Split, then widen: the other way around XLA writes a float32 copy.
  gate, up = (h.astype(dtype) for h in jnp.split(both, 2, axis=-1))
  hidden = jax.nn.silu(gate) * up * weights
  hidden = jnp.where(used, hidden, 0).astype(rows.dtype)
  return _grouped_matmul(hidden, matrices.down, sizes, spec)


def _spread_weights(weights, choice, slot):
  return spread(weights.reshape(-1, 1), choice, slot.reshape(-1, 1))


def _local(x, weights, choices, matrices: _Matrices, spec: ExpertSpec):
  """All experts are here: one sort, no exchange."""
  flat = choices.reshape(-1)
  order, rank = _ordered(flat)
  tile = _row_tile(spec, flat.size)
  order = jnp.pad(order, (0, -flat.size % tile))
  slot = rank.reshape(choices.shape)
  rows = spread(x, order, slot)
  w = _spread_weights(weights, order, slot)
  sizes = _counts(flat, matrices.down.shape[0])
  return collect(_expert_mlp(rows, w, matrices, sizes, spec), order, slot)


class _Plan(NamedTuple):
  """Where this device's choices go, before they are cut into rounds."""

  order: Int[Array, ' n']  # choices sorted by expert
  offset: Int[Array, ' P']  # where each device's part of them begins
  counts: Int[Array, ' P']
  device: Int[Array, 'M k']  # of each choice
  position: Int[Array, 'M k']  # of each choice within its device's part
  rounds: Int[Array, '']


def _plan(choices, local_experts: int, capacity: int, spec: ExpertSpec):
  devices = jax.lax.axis_size(spec.expert_axis)
  flat = choices.reshape(-1)
  order, rank = _ordered(flat)
  device = flat // local_experts
  count = _counts(device, devices)
  offset = jnp.cumsum(count) - count
  rounds = -(-count.max() // capacity)
  # Every device of the mesh runs as many rounds as the worst one: a loop
  # with collectives inside must end everywhere at once.
  rounds = jax.lax.pmax(rounds, spec.token_axes or (spec.expert_axis,))
  shape = choices.shape
  position = rank - jnp.take(offset, device)
  return _Plan(
    order,
    offset,
    count,
    device.reshape(shape),
    position.reshape(shape),
    rounds,
  )


def _capacity(choices, local_experts: int, spec: ExpertSpec) -> int:
  """Rows per pair of devices in one round."""
  tokens, k = choices.shape
  devices = jax.lax.axis_size(spec.expert_axis)
  most = tokens * min(k, local_experts)
  even = int(-(-tokens * k * spec.slack // devices))
  # So that all devices' rows together are a multiple of the kernel's tile.
  tile = max(8, _row_tile(spec, even * devices) // math.gcd(devices, 64))
  return -(-min(most, even) // tile) * tile


def _one_round(x, weights, matrices, choices, plan, step, spec):
  """Sends up to `capacity` rows to every device and sums what comes back."""
  local_experts = matrices.down.shape[0]
  capacity = _capacity(choices, local_experts, spec)
  devices = plan.counts.size
  first = step * capacity
  place = first + jnp.arange(capacity, dtype=jnp.int32)
  used = place < plan.counts[:, None]
  index = jnp.where(used, plan.offset[:, None] + place, 0)
  choice = jnp.take(plan.order, index.reshape(-1))
  expert = jnp.take(choices.reshape(-1), choice) % local_experts
  expert = jnp.where(used.reshape(-1), expert, local_experts)
  position = plan.position - first
  inside = (position >= 0) & (position < capacity)
  slot = jnp.where(
    inside, plan.device * capacity + position, devices * capacity
  )
  swap = functools.partial(
    jax.lax.all_to_all,
    axis_name=spec.expert_axis,
    split_axis=0,
    concat_axis=0,
    tiled=True,
  )
  rows = swap(spread(x, choice, slot))
  w = swap(_spread_weights(weights, choice, slot))
  ids = swap(expert)
  order, rank = _ordered(ids)
  y = _expert_mlp(
    permute(rows, order, rank),
    permute(w, order, rank),
    matrices,
    _counts(ids, local_experts),
    spec,
  )
  return collect(swap(permute(y, rank, order)), choice, slot)


def _loop(plan: _Plan, body, start):
  """start + body(0) + ... + body(rounds - 1), leaf by leaf."""

  def step(carry):
    i, total = carry
    return i + 1, jax.tree.map(jnp.add, total, body(i))

  _, total = jax.lax.while_loop(
    lambda carry: carry[0] < plan.rounds, step, (jnp.int32(0), start)
  )
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _exchange(x, weights, choices, matrices: _Matrices, spec: ExpertSpec):
  """Experts are split over spec.expert_axis: rounds of all-to-all."""
  local_experts = matrices.down.shape[0]
  plan = _plan(
    choices, local_experts, _capacity(choices, local_experts, spec), spec
  )

  def body(step):
    return _one_round(x, weights, matrices, choices, plan, step, spec)

  return _loop(plan, body, jnp.zeros_like(x))


def _exchange_forward(x, weights, choices, matrices, spec):
  y = _exchange(x, weights, choices, matrices, spec)
  return y, (x, weights, choices, matrices)


def _exchange_backward(spec, saved, grad):
  x, weights, choices, matrices = saved
  local_experts = matrices.down.shape[0]
  plan = _plan(
    choices, local_experts, _capacity(choices, local_experts, spec), spec
  )

  def body(step):
    def forward(x, weights, matrices):
      return _one_round(x, weights, matrices, choices, plan, step, spec)

    return jax.vjp(forward, x, weights, matrices)[1](grad)

  zeros = jax.tree.map(jnp.zeros_like, (x, weights, matrices))
  dx, dweights, dmatrices = _loop(plan, body, zeros)
  return dx, dweights, None, dmatrices


_exchange.defvjp(_exchange_forward, _exchange_backward)
