"""Experts that are split over devices: rounds of all-to-all.

(token, expert) pairs travel in buffers of a fixed size, in as many rounds as
the fullest pair of devices needs: one round while the load is even
(`ExpertSpec.slack` above the mean), more when it is not. So no token is
dropped, memory stays bounded, and no platform needs ragged collectives. The
loop is written with its own backward pass, which runs the same rounds and
recomputes them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.moe import rows as order_of_rows
from gated_jax.ops.moe.experts import ExpertSpec
from gated_jax.ops.moe.experts import Matrices
from gated_jax.ops.moe.experts import swiglu
from gated_jax.ops.moe.grouped_matmul import row_tile


class _Plan(NamedTuple):
  """The destinations of this device's choices, not yet cut into rounds."""

  order: Int[Array, ' n']  # choices sorted by expert
  offset: Int[Array, ' P']  # start of each device's part of them
  counts: Int[Array, ' P']
  device: Int[Array, 'M k']  # device of each choice
  position: Int[Array, 'M k']  # each choice's, within its device's part
  rounds: Int[Array, '']


def _plan(
  choices: Int[Array, 'M k'], local_experts: int, spec: ExpertSpec
) -> _Plan:
  """Sorts this device's choices by the device that has their expert."""
  capacity = _capacity(choices, local_experts, spec)
  devices = jax.lax.axis_size(spec.expert_axis)
  flat = choices.reshape(-1)
  order, rank = order_of_rows.sort(flat)
  device = flat // local_experts
  counts = order_of_rows.count(device, devices)
  offset = jnp.cumsum(counts) - counts
  rounds = -(-counts.max() // capacity)
  # Every device of the mesh runs as many rounds as the worst one: a loop
  # with collectives inside must end everywhere at once.
  rounds = jax.lax.pmax(rounds, spec.token_axes or (spec.expert_axis,))
  shape = choices.shape
  position = rank - jnp.take(offset, device)
  return _Plan(
    order,
    offset,
    counts,
    device.reshape(shape),
    position.reshape(shape),
    rounds,
  )


def _capacity(
  choices: Int[Array, 'M k'], local_experts: int, spec: ExpertSpec
) -> int:
  """Rows per pair of devices in one round."""
  tokens, k = choices.shape
  devices = jax.lax.axis_size(spec.expert_axis)
  most = tokens * min(k, local_experts)
  even = int(-(-tokens * k * spec.slack // devices))
  # All devices' rows together must be a multiple of the kernel's tile.
  tile = row_tile(spec.implementation, even * devices)
  tile = max(8, tile // math.gcd(devices, 64))
  return -(-min(most, even) // tile) * tile


def _one_round(
  x: Float[Array, 'M D'],
  weights: Float[Array, 'M k'],
  matrices: Matrices,
  choices: Int[Array, 'M k'],
  plan: _Plan,
  step: Int[Array, ''],
  spec: ExpertSpec,
) -> Float[Array, 'M D']:
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
  rows = swap(order_of_rows.spread(x, choice, slot))
  row_weights = swap(order_of_rows.spread_weights(weights, choice, slot))
  ids = swap(expert)
  order, rank = order_of_rows.sort(ids)
  y = swiglu(
    order_of_rows.permute(rows, order, rank),
    order_of_rows.permute(row_weights, order, rank),
    matrices,
    order_of_rows.count(ids, local_experts),
    spec,
  )
  back = swap(order_of_rows.permute(y, rank, order))
  return order_of_rows.collect(back, choice, slot)


def _loop(
  plan: _Plan, body: Callable[[Int[Array, '']], Any], start: Any
) -> Any:
  """start + body(0) + ... + body(rounds - 1), leaf by leaf."""

  def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
    """Adds one more round."""
    i, total = carry
    return i + 1, jax.tree.map(jnp.add, total, body(i))

  _, total = jax.lax.while_loop(
    lambda carry: carry[0] < plan.rounds, step, (jnp.int32(0), start)
  )
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def exchange(
  x: Float[Array, 'M D'],
  weights: Float[Array, 'M k'],
  choices: Int[Array, 'M k'],
  matrices: Matrices,
  spec: ExpertSpec,
) -> Float[Array, 'M D']:
  """Each token through its experts, which are split over spec.expert_axis.

  Args:
    x: this device's tokens.
    weights: one for each choice.
    choices: experts of each token, numbered over all devices.
    matrices: this device's experts.
    spec: static options.
  """
  plan = _plan(choices, matrices.down.shape[0], spec)

  def body(step: Int[Array, '']) -> Float[Array, 'M D']:
    """The outputs of one round."""
    return _one_round(x, weights, matrices, choices, plan, step, spec)

  return _loop(plan, body, jnp.zeros_like(x))


def _forward(
  x: Array, weights: Array, choices: Array, matrices: Matrices, spec: ExpertSpec
) -> tuple[Array, Any]:
  y = exchange(x, weights, choices, matrices, spec)
  return y, (x, weights, choices, matrices)


def _backward(
  spec: ExpertSpec, saved: Any, grad: Array
) -> tuple[Array, Array, None, Matrices]:
  x, weights, choices, matrices = saved
  plan = _plan(choices, matrices.down.shape[0], spec)

  def body(step: Int[Array, '']) -> Any:
    """The gradients of one round."""

    def forward(x: Array, weights: Array, matrices: Matrices) -> Array:
      """The round that is differentiated, computed again."""
      return _one_round(x, weights, matrices, choices, plan, step, spec)

    return jax.vjp(forward, x, weights, matrices)[1](grad)

  zeros = jax.tree.map(jnp.zeros_like, (x, weights, matrices))
  dx, dweights, dmatrices = _loop(plan, body, zeros)
  return dx, dweights, None, dmatrices


exchange.defvjp(_forward, _backward)
