"""Experts that are split over devices: chunks of tokens and all-to-all.

(token, expert) pairs travel in buffers of a fixed size, a little above an even
share (`ExpertSpec.slack`). Pairs that find no place there follow in further,
smaller rounds, as many as the fullest pair of devices needs: usually none. So
no token is dropped, memory stays bounded, and no platform needs ragged
collectives.

A device's tokens are worked through in `ExpertSpec.chunks` parts that do not
depend on one another, so that the compiler can move the rows of one part while
it multiplies those of another.

The backward pass is written by hand: it runs the same rounds and recomputes
them, but for what `ExpertSpec.saved` names: rows that were saved are not sent
again. Further rounds save nothing.
"""

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.moe import rows as order_of_rows
from gated_jax.ops.moe.experts import PRODUCT_NAME
from gated_jax.ops.moe.experts import ROWS_NAME
from gated_jax.ops.moe.experts import ExpertSpec
from gated_jax.ops.moe.experts import Matrices
from gated_jax.ops.moe.experts import first_product
from gated_jax.ops.moe.experts import second_product
from gated_jax.ops.moe.grouped_matmul import row_tile

# The scope of the rounds that an even load does not need. `gated_jax/aot`
# knows their loop by this name.
FURTHER_ROUNDS = 'further_rounds'
# Rows of a further round's buffers, over an even share: small, because it is
# seldom that many are left.
FURTHER_SHARE = 0.25


class _Plan(NamedTuple):
  """Where the choices of one chunk of tokens go."""

  order: Int[Array, ' n']  # choices sorted by expert, numbered over all chunks
  offset: Int[Array, ' P']  # start of each device's part of them
  counts: Int[Array, ' P']
  device: Int[Array, 'm k']  # device of each choice
  position: Int[Array, 'm k']  # each choice's, within its device's part


def _plans(
  choices: Int[Array, 'M k'], local_experts: int, spec: ExpertSpec
) -> list[_Plan]:
  """Sorts the choices of each chunk by the device that has their expert."""
  chunks = math.gcd(choices.shape[0], spec.chunks)
  devices = jax.lax.axis_size(spec.expert_axis)
  plans = []
  for number, part in enumerate(jnp.split(choices, chunks)):
    flat = part.reshape(-1)
    order, rank = order_of_rows.sort(flat)
    device = flat // local_experts
    counts = order_of_rows.count(device, devices)
    offset = jnp.cumsum(counts) - counts
    position = rank - jnp.take(offset, device)
    plans.append(
      _Plan(
        order + number * flat.size,
        offset,
        counts,
        device.reshape(part.shape),
        position.reshape(part.shape),
      )
    )
  return plans


def _capacity(
  plan: _Plan, local_experts: int, slack: float, spec: ExpertSpec
) -> int:
  """Rows per pair of devices in one round, `slack` times an even share."""
  tokens, k = plan.device.shape
  devices = plan.counts.size
  most = tokens * min(k, local_experts)
  wanted = math.ceil(tokens * k * slack / devices)
  # All devices' rows together must be a multiple of the kernel's tile.
  tile = row_tile(spec.implementation, wanted * devices)
  tile = max(8, tile // math.gcd(devices, 64))
  return -(-min(most, wanted) // tile) * tile


class _Saved(NamedTuple):
  """The arrays that forward leaves to backward; None: made again."""

  rows: Float[Array, 'R D'] | None
  both: Float[Array, 'R F2'] | None


class _Result(NamedTuple):
  """The arrays of one round of one chunk."""

  product: Array | None  # the last of those that make `own`
  home: Array | None  # that product, back on the devices of its tokens
  own: Any  # adds to the chunk's own arrays; their first axis is its tokens
  common: Any  # arrays that every round adds to, this one included
  saved: _Saved = _Saved(None, None)


class _Route(NamedTuple):
  """The ways there and back of the rows of one chunk in one round.

  On the sender's side a row is a choice of one of its tokens, on the receiver's
  it stands among the rows of one of its experts.
  """

  axis: str  # mesh axis of the experts
  choice: Int[Array, ' R']  # choice that each row is sent for
  slot: Int[Array, 'm k']  # row of each choice; R where it has none
  order: Int[Array, ' R']  # received rows sorted by expert, and the inverse
  rank: Int[Array, ' R']
  sizes: Int[Array, ' E']  # received rows of each expert

  def send(
    self, tokens: Float[Array, 'M D'], previous: _Result | None
  ) -> Float[Array, 'R D']:
    """The received rows, sorted by expert.

    Args:
      tokens: all of this device's.
      previous: its product has to be there before the rows are read.
    """
    rows = order_of_rows.spread(tokens, self.choice, self.slot)
    rows = _swap(rows, self.axis)
    if previous is not None and previous.product is not None:
      rows, _ = jax.lax.optimization_barrier((rows, previous.product))
    return order_of_rows.permute(rows, self.order, self.rank)

  def send_weights(self, weights: Float[Array, 'M k']) -> Float[Array, 'R 1']:
    """The weights of the received rows."""
    rows = order_of_rows.spread_weights(weights, self.choice, self.slot)
    return order_of_rows.permute(_swap(rows, self.axis), self.order, self.rank)

  def collect(
    self, rows: Float[Array, 'R D'], previous: _Result | None
  ) -> tuple[Float[Array, 'm D'], Float[Array, 'R D']]:
    """The sum of each token's rows, and the rows, after they were sent home.

    Args:
      rows: as they were received.
      previous: its rows have to be home before these are sent.
    """
    if previous is not None and previous.home is not None:
      rows, _ = jax.lax.optimization_barrier((rows, previous.home))
    rows = order_of_rows.permute(rows, self.rank, self.order)
    rows = _swap(rows, self.axis)
    return order_of_rows.collect(rows, self.choice, self.slot), rows

  def collect_weights(self, rows: Float[Array, 'R 1']) -> Float[Array, 'm k']:
    """Sends what belongs to received rows home, to the choices they are of."""
    rows = order_of_rows.permute(rows, self.rank, self.order)
    rows = _swap(rows, self.axis)
    slot = self.slot.reshape(-1, 1)
    flat = order_of_rows.collect(rows, self.choice, slot)
    return flat.reshape(self.slot.shape)


def _swap(rows: Array, axis: str) -> Array:
  """Gives every device of the axis its part of the rows."""
  return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)


def _route(
  choices: Int[Array, 'M k'],
  plan: _Plan,
  first: Int[Array, ''] | int,
  capacity: int,
  local_experts: int,
  axis: str,
) -> _Route:
  """The way of up to `capacity` rows to every device.

  Args:
    choices: experts of all of this device's tokens.
    plan: of one chunk.
    first: rows to each device that went in earlier rounds.
    capacity: as above.
    local_experts: experts of one device.
    axis: mesh axis that splits the experts.
  """
  devices = plan.counts.size
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
  ids = _swap(expert, axis)
  order, rank = order_of_rows.sort(ids)
  sizes = order_of_rows.count(ids, local_experts)
  return _Route(axis, choice, slot, order, rank, sizes)


# From a route, the result of the round before (None: it is the first) and what
# forward saved of this round. What a chunk receives is not read before the
# product of the chunk before is there: else the compiler exchanges all rows
# before the first product, and has no work left to hide them behind. Nor is a
# chunk sent home before the chunk before has arrived there: else the compiler
# sends both home behind the last product.
_Body = Callable[[_Route, _Result | None, _Saved], _Result]


def _run(
  choices: Int[Array, 'M k'],
  local_experts: int,
  spec: ExpertSpec,
  body: _Body,
  saved: Sequence[_Saved] = (),
) -> tuple[Any, Any, tuple[_Saved, ...]]:
  """All rounds of all chunks.

  Args:
    choices: experts of this device's tokens.
    local_experts: experts of one device.
    spec: static options.
    body: one round, as above.
    saved: by the forward pass, of each chunk; (): this is the forward pass.

  Returns:
    The chunks' own arrays, one chunk after the other, the common ones, and what
    each chunk's first round saves.
  """
  plans = _plans(choices, local_experts, spec)
  axis = spec.expert_axis
  capacity = _capacity(plans[0], local_experts, spec.slack, spec)
  nothing = _Saved(None, None)
  rounds: list[_Result] = []
  for plan, old in zip(plans, saved or [nothing] * len(plans), strict=True):
    route = _route(choices, plan, 0, capacity, local_experts, axis)
    rounds.append(body(route, rounds[-1] if rounds else None, old))
  own = jax.tree.map(lambda *parts: _join(parts), *(r.own for r in rounds))
  further = _capacity(plans[0], local_experts, FURTHER_SHARE, spec)
  fullest = functools.reduce(jnp.maximum, (plan.counts.max() for plan in plans))
  more = -(-jnp.maximum(fullest - capacity, 0) // further) * len(plans)
  # Every device of the mesh runs as many rounds as the worst one: a loop
  # with collectives inside must end everywhere at once.
  more = jax.lax.pmax(more, spec.token_axes or (axis,))
  stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *plans)

  def step(carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
    """Adds one further round of one chunk."""
    i, own, common = carry
    number = i % len(plans)
    plan = jax.tree.map(lambda part: part[number], stacked)
    first = capacity + i // len(plans) * further
    route = _route(choices, plan, first, further, local_experts, axis)
    added = body(route, _Result(None, None, None, common), nothing)
    own = jax.tree.map(lambda x, part: _add(x, part, number), own, added.own)
    return i + 1, own, added.common

  with jax.named_scope(FURTHER_ROUNDS):
    _, own, common = jax.lax.while_loop(
      lambda carry: carry[0] < more,
      step,
      (jnp.int32(0), own, rounds[-1].common),
    )
  return own, common, tuple(result.saved for result in rounds)


def _join(parts: tuple[Array, ...]) -> Array:
  """Parts one after the other, each written in place.

  XLA:TPU makes of `concatenate` two more passes over all of them.
  """
  if len(parts) == 1:
    return parts[0]
  rows = parts[0].shape[0]
  shape = (len(parts) * rows, *parts[0].shape[1:])
  whole = jax.lax.empty(shape, parts[0].dtype)
  for number, part in enumerate(parts):
    whole = jax.lax.dynamic_update_slice_in_dim(whole, part, number * rows, 0)
  return whole


def _add(
  whole: Float[Array, 'M ...'],
  part: Float[Array, 'm ...'],
  number: Int[Array, ''],
) -> Float[Array, 'M ...']:
  """Adds to the part of that number."""
  rows = part.shape[0]
  old = jax.lax.dynamic_slice_in_dim(whole, number * rows, rows, 0)
  return jax.lax.dynamic_update_slice_in_dim(
    whole, old + part, number * rows, 0
  )


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

  return _forward(x, weights, choices, matrices, spec)[0]


def _forward(
  x: Array, weights: Array, choices: Array, matrices: Matrices, spec: ExpertSpec
) -> tuple[Array, Any]:
  def body(route: _Route, previous: _Result | None, _: _Saved) -> _Result:
    """The outputs of one round."""
    rows = checkpoint_name(route.send(x, previous), ROWS_NAME)
    row_weights = route.send_weights(weights)
    both = first_product(rows, matrices.into, route.sizes, spec)
    out = matrices.down, matrices.scale
    y = second_product(both, row_weights, out, route.sizes, spec)
    saved = _Saved(
      rows if ROWS_NAME in spec.saved else None,
      both if PRODUCT_NAME in spec.saved else None,
    )
    own, home = route.collect(y, previous)
    return _Result(y, home, own, (), saved)

  y, _, saved = _run(choices, matrices.down.shape[0], spec, body)
  return y, (x, weights, choices, matrices, saved)


def _backward(
  spec: ExpertSpec, residuals: Any, grad: Array
) -> tuple[Array, Array, None, Matrices]:
  x, weights, choices, matrices, saved = residuals

  def body(route: _Route, previous: _Result | None, old: _Saved) -> _Result:
    """The gradients of one round. `send` and `collect` are each other's."""
    earlier = (previous and previous.common) or (None, None, None)
    into, down, d_scale = earlier

    def first(rows: Array, matrices: tuple[Array, ...]) -> Array:
      """The first product, which is made again where it was not saved."""
      return first_product(rows, matrices, route.sizes, spec, into)

    def second(both: Array, weights: Array, out: tuple[Array, Any]) -> Array:
      """The second product, whose value a norm alone reads."""
      return second_product(both, weights, out, route.sizes, spec, down)

    rows = route.send(x, previous) if old.rows is None else old.rows
    d_y = route.send(grad, previous)
    both, pull_first = jax.vjp(first, rows, matrices.into)
    both = both if old.both is None else old.both
    row_weights = route.send_weights(weights)
    out = matrices.down, matrices.scale
    pull_second = jax.vjp(second, both, row_weights, out)[1]
    d_both, d_weights, (d_down, added) = pull_second(d_y)
    if added is not None:
      d_scale = added if d_scale is None else d_scale + added
    d_rows, d_into = pull_first(d_both)
    d_x, home = route.collect(d_rows, previous)
    own = d_x, route.collect_weights(d_weights)
    return _Result(d_rows, home, own, Matrices(d_into, d_down, d_scale))

  own, common, _ = _run(choices, matrices.down.shape[0], spec, body, saved)
  return *own, None, common


exchange.defvjp(_forward, _backward)
