"""Which keys a query sees, and how the TPU kernels cut what is visible.

Forward keeps a block of queries and walks over keys; backward keeps a block
of keys and walks over queries. Tiles in which every query sees every key are
taken in large steps without a mask, in a loop. What remains, the diagonal and
the far edge of a window, is cut finer, into strips whose place relative to
the block is known when the kernel is compiled: `key_strips`, `query_strips`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.chips import LANES
from gated_jax.ops.attention.padding import round_up

# A hidden attention logit lies far below FLOOR, where running maxima begin, so
# its weight is exactly zero even in rows that see nothing.
FLOOR = -1e30
HIDDEN = -2e30


@dataclasses.dataclass(frozen=True)
class MaskRule:
  """Which keys a query sees, as far as it is known before the call."""

  causal: bool
  window: int
  segments: bool


@dataclasses.dataclass(frozen=True)
class Strip:
  """A narrow tile along a block, placed relative to the block's start.

  Forward: `width` keys from `start`, which rows first..last of the block of
  queries see. Backward: `width` queries from `start`, which see keys
  first..last of the block of keys.
  """

  start: int
  width: int
  first: int
  last: int


def key_strips(
  rule: MaskRule, block: int, width: int, step: int
) -> list[Strip]:
  """Keys that some queries of a causal block see, beside `key_steps`."""
  if not rule.causal:
    return []
  early, _ = key_steps(rule, block, step)
  starts = range(0, block, width)
  if rule.window:
    starts = range(-round_up(rule.window - 1, width), block, width)
  strips = []
  for start in starts:
    if rule.window and early <= start < 0:
      continue
    last = block
    if rule.window:
      last = min(block, round_up(start + width + rule.window - 1, LANES))
    strips.append(Strip(start, width, max(0, start), last))
  return strips


def key_steps(rule: MaskRule, block: int, step: int) -> tuple[int, int]:
  """Range of keys, relative to a causal block, that all its queries see."""
  if not rule.window:
    return -(2**30), 0
  return min(0, -((rule.window - block) // step) * step), 0


def query_strips(
  rule: MaskRule, block: int, width: int, step: int
) -> list[Strip]:
  """Queries that see some keys of a causal block, beside `query_steps`."""
  if not rule.causal:
    return []
  _, late = query_steps(rule, block, step)
  starts = range(0, block, width)
  if rule.window:
    starts = range(0, block + round_up(rule.window - 1, width), width)
  strips = []
  for start in starts:
    if rule.window and block <= start < late:
      continue
    first = 0
    if rule.window:
      first = max(0, (start - rule.window + 1) // LANES * LANES)
    strips.append(Strip(start, width, first, min(block, start + width)))
  return strips


def query_steps(rule: MaskRule, block: int, step: int) -> tuple[int, int]:
  """Range of queries, relative to a causal block, that see all its keys."""
  if not rule.window:
    return block, 2**30
  return block, max(block, block + (rule.window - block) // step * step)


def group_by_span(strips: list[Strip], span: int) -> list[list[Strip]]:
  """Groups the strips that lie in the same part of `span`."""
  groups: dict[int, list[Strip]] = {}
  for strip in strips:
    groups.setdefault(strip.start // span, []).append(strip)
  return list(groups.values())


def for_each_step(
  start: Array, end: Array | int, step: int, visit: Callable[[Array], None]
) -> None:
  """Calls visit(start), visit(start + step), .. below end; maybe never."""

  def body(i: Array, _: None) -> None:
    """One trip; its start is a multiple of the step, as tiles need."""
    visit(pl.multiple_of(start + i * step, step))

  lax.fori_loop(0, lax.div(end - start, step), body, None)


def part_of(x: Any, part: int, parts: int) -> Any:
  """Index of the part that holds position x, or of the nearest part."""
  if isinstance(x, int):
    return min(max(x, 0) // part, parts - 1)
  # jnp's // handles negative numbers, at a cost that a kernel can do without.
  return jnp.minimum(lax.div(jnp.maximum(x, 0), part), parts - 1)


def segment_spans(ids: Int[Array, 'B 1 L'], width: int) -> Int[Array, 'B 2 C']:
  """The least and the largest document number of each stretch of `width`."""
  stretches = ids.reshape(ids.shape[0], -1, width)
  return jnp.stack([stretches.min(-1), stretches.max(-1)], axis=1)


def may_overlap(tables: tuple[Any, Any, Any], i: Any, j: Any) -> Array:
  """True where stretches i and j may share a document.

  Args:
    tables: `segment_spans` of either side, and the row of the batch.
    i: a stretch of the first side.
    j: a stretch of the second side.
  """
  first, second, row = tables
  return (first[row, 0, i] <= second[row, 1, j]) & (
    second[row, 0, j] <= first[row, 1, i]
  )


def hide(
  attention_logits: Float[Array, 'R C'],
  rule: MaskRule,
  offset: int | None,
  query_axis: int,
  segments: tuple[Int[Array, 'R _'], Int[Array, '_ C']] | None,
) -> Float[Array, 'R C']:
  """The one mask of all kernels: HIDDEN where a query must not see a key.

  Args:
    attention_logits: those of one tile.
    rule: what is hidden.
    offset: position of the tile's first query less that of its first key; None
      where causality and window hide nothing.
    query_axis: the axis of queries, 0 forward and 1 backward.
    segments: numbers of rows and columns, where the rule has them.
  """
  visible = None
  if offset is not None:
    shape = attention_logits.shape
    ahead = lax.broadcasted_iota(jnp.int32, shape, query_axis)
    ahead -= lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    visible = ahead >= -offset
    if rule.window:
      visible &= ahead < rule.window - offset
  if segments is not None:
    same = segments[0] == segments[1]
    visible = same if visible is None else visible & same
  if visible is None:
    return attention_logits
  return jnp.where(visible, attention_logits, HIDDEN)
