"""One step of the backward kernel: a part of the keys with one of the queries.

`backward.py` has the formulas, and the arrays around the kernel.
"""

import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from gated_jax.ops.attention import vjp
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu import vectors
from gated_jax.ops.attention.pallas_tpu.backward_grid import Grid
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec


class _Refs(NamedTuple):
  """References to all arrays of the kernel; None: this call has no such."""

  key: Any
  value: Any
  query: Any
  d_gated: Any
  saved: Any  # the gated output, or the ungated one
  lse: Any
  d_lse: Any
  d_key: Any
  d_value: Any
  d_query: Any
  sum_key: Any
  sum_value: Any
  sum_query: Any
  d_output: Any  # dY
  delta: Any  # [1, R], less the gradient of lse
  log2_total: Any  # lse in base 2, [1, R]
  gate_logits: Any = None
  d_gate_logits: Any = None
  query_spans: Any = None
  key_spans: Any = None
  query_ids: Any = None
  key_ids: Any = None
  id_columns: Any = None  # key_ids as [R, 128] of equal columns


def kernel(
  *refs: Any, names: tuple[str, ...], spec: KernelSpec, grid: Grid
) -> None:
  """One resident part of keys, one of the queries of one head."""
  j, g, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)
  parts, count = pl.num_programs(2), pl.num_programs(4)
  last_head = g == pl.num_programs(3) - 1
  step = _Step(
    _Refs(**dict(zip(names, refs, strict=True))),
    spec,
    grid,
    b=pl.program_id(0),
    slot=g * count + i,
    near=(parts - 1 - j) * grid.part,
    begin=grid.queries.start + i * grid.queries.resident,
  )

  @pl.when((g == 0) & (i == 0))
  def _() -> None:
    step.start_keys()

  @pl.when((j == 0) & (not step.square))
  def _() -> None:
    step.start_queries()

  visible = step.sees_something()

  @pl.when(step.has_prologue(visible, j == parts - 1))
  def _() -> None:
    rows, stride = grid.queries.resident, spec.blocks.back_queries
    masks.for_each_step(jnp.int32(0), rows, stride, step.prologue)

  @pl.when(visible)
  def _() -> None:
    block = spec.blocks.back_keys
    masks.for_each_step(jnp.int32(0), grid.part, block, step.take_keys)

  @pl.when(j == parts - 1)
  def _() -> None:
    step.end_queries()

  @pl.when(last_head & (i == count - 1))
  def _() -> None:
    step.end_keys()


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step of the grid; positions are those of the padded sequence."""

  refs: _Refs
  spec: KernelSpec
  grid: Grid
  b: Any  # row of the batch
  slot: Any  # index of these queries and this head in sum_query
  near: Any  # position of the first key
  begin: Any  # position of the first query

  @property
  def square(self) -> bool:
    """True where every part of queries starts with its own diagonal block.

    Query and key parts then have equal size. The prologue runs on the diagonal,
    hidden behind matmuls, and the first product initialises dQ.
    """
    spec, grid = self.spec, self.grid
    unmasked = spec.rule.causal and not spec.rule.window
    same = grid.part == grid.queries.resident
    return unmasked and same and spec.queries == spec.keys

  def sees_something(self) -> Any:
    """True where any of the queries sees any of the keys."""
    rule, visible = self.spec.rule, True
    if rule.causal:
      visible = self.begin + self.grid.queries.resident > self.near
    if rule.window:
      end = self.near + self.grid.part + rule.window - 1
      visible &= self.begin < end
    return visible

  def has_prologue(self, visible: Any, final: Any) -> Any:
    """True where the prologue runs before the products, not among them.

    Args:
      visible: whether there are products.
      final: whether it is the last part of keys, which all queries meet so
        that their gate's gradient is written.
    """
    if not self.square:
      return final | visible
    # If there is a single part, every prologue runs on the diagonal.
    one_part = self.spec.keys == self.grid.part
    return False if one_part else self.begin > self.near

  def start_keys(self) -> None:
    """Sets the keys' sums to zero, and document numbers as columns."""
    refs = self.refs
    refs.sum_key[...] = jnp.zeros_like(refs.sum_key)
    refs.sum_value[...] = jnp.zeros_like(refs.sum_value)
    if refs.key_ids is not None:
      refs.id_columns[...] = vectors.to_column(refs.key_ids[0])

  def start_queries(self) -> None:
    """Sets dQ of these queries to zero."""
    refs = self.refs
    refs.sum_query[self.slot] = jnp.zeros(refs.sum_query.shape[1:], jnp.float32)

  def end_queries(self) -> None:
    """Writes dQ of these queries."""
    refs = self.refs
    d_query = refs.sum_query[self.slot] * self.spec.scale
    refs.d_query[0] = d_query.astype(refs.d_query.dtype)

  def end_keys(self) -> None:
    """Writes dK and dV of the part."""
    refs = self.refs
    d_key = refs.sum_key[...] * self.spec.scale
    refs.d_key[0] = d_key.astype(refs.d_key.dtype)
    refs.d_value[0] = refs.sum_value[...].astype(refs.d_value.dtype)

  def prologue(self, at: Any) -> None:
    """dY, delta and the gate's gradient of some queries, from `at` on."""
    refs, spec = self.refs, self.spec
    rows = pl.ds(at, spec.blocks.back_queries)
    dtype = refs.saved.dtype

    def to_columns(x: Array) -> Array:
      """A row of numbers as columns as wide as a value."""
      return vectors.broadcast_lanes(vectors.to_column(x), spec.value_dim)

    d_output, delta, d_gate_logits = vjp.gate_backward(
      refs.d_gated[0, rows],
      refs.saved[0, rows],
      self._gate_logits(rows),
      spec.gate,
      vectors.activation_of(spec.gate.activation, dtype),
      vjp.RowLayout(to_columns, vectors.to_row),
    )
    refs.d_output[rows] = d_output
    refs.delta[:, rows] = delta - refs.d_lse[0, 0, :, rows]
    # exp2(attention_logits - lse) is zero in rows that see nothing.
    lse = refs.lse[0, 0, :, rows]
    lse = jnp.where(lse == -jnp.inf, -masks.FLOOR, lse)
    refs.log2_total[:, rows] = lse * math.log2(math.e)
    if d_gate_logits is None:
      return
    if spec.granularity == 'elementwise':
      refs.d_gate_logits[0, rows] = d_gate_logits
    else:
      refs.d_gate_logits[0, 0, :, rows] = d_gate_logits.astype(jnp.float32)

  def _gate_logits(self, rows: Any) -> Array | None:
    """Gate logits of some rows: [R, V], or [1, R] where each has one."""
    refs, spec = self.refs, self.spec
    if refs.gate_logits is None:
      return None
    if spec.granularity == 'elementwise':
      return refs.gate_logits[0, rows]
    row = refs.gate_logits[0, 0, :, rows]
    # Rows travel in float32, which rounds nothing; the spec may want rounding.
    return row.astype(refs.saved.dtype) if spec.gate.model_dtype else row

  def take_keys(self, at: Any) -> None:
    """One block of the part's keys, from the last, with all queries."""
    spec, rule = self.spec, self.spec.rule
    block, step = spec.blocks.back_keys, spec.blocks.back_queries
    rows = self.grid.queries.resident
    chunk = self.grid.part - block - at
    place = self.near + chunk  # position of the block
    self._take_strips(chunk, place)
    start, end = jnp.int32(self.begin), jnp.int32(self.begin + rows)
    if rule.causal:
      early, late = masks.query_steps(rule, block, step)
      start = jnp.maximum(place + early, start)
      end = jnp.minimum(place + late, end)

    def visit(at: Any) -> None:
      """Takes a block of queries that needs no mask but documents."""
      self.take(at, step, chunk, (0, block), None)

    def visit_unless_hidden(at: Any) -> None:
      """Leaves out blocks that share no document."""
      refs = self.refs
      tables = (refs.query_spans, refs.key_spans, self.b)
      of_queries = lax.div(self.begin + at, step)
      of_keys = lax.div(place, block)
      overlap = masks.may_overlap(tables, of_queries, of_keys)
      pl.when(overlap)(lambda: visit(at))

    masks.for_each_step(
      start - self.begin,
      end - self.begin,
      step,
      visit_unless_hidden if rule.segments else visit,
    )

  def _take_strips(self, chunk: Any, place: Any) -> None:
    """The diagonal of a block of keys, and the far edge of a window."""
    blocks, rows = self.spec.blocks, self.grid.queries.resident
    block, step = blocks.back_keys, blocks.back_queries
    strips = masks.query_strips(self.spec.rule, block, blocks.back_strip, step)
    for group in masks.group_by_span(strips, math.gcd(block, rows)):
      base = place + group[0].start - self.begin

      @pl.when((base >= 0) & (base < rows))
      def _(group: list[masks.Strip] = group, base: Any = base) -> None:
        for strip in group:
          at = base + strip.start - group[0].start
          at = pl.multiple_of(at, blocks.back_strip)
          if self.square and strip.start % step == 0:
            self.prologue(at)
          keys = (strip.first, strip.last)
          offset = strip.start - strip.first
          self.take(at, strip.width, chunk, keys, offset, self.square)

  def take(
    self,
    at: Any,
    width: int,
    chunk: Any,
    keys: tuple[int, int],
    offset: int | None,
    fresh: bool = False,
  ) -> None:
    """Adds a tile's products to the sums of all gradients.

    Args:
      at: its first query, in the part of the queries.
      width: number of its queries.
      chunk: the block of keys that it belongs to, in the part of the keys.
      keys: its first key and the one after its last, in the block.
      offset: as `masks.hide` has it.
      fresh: whether dQ of these queries has no terms yet.
    """
    refs, spec, slot = self.refs, self.spec, self.slot
    lo, hi = keys
    rows, columns = pl.ds(at, width), pl.ds(chunk + lo, hi - lo)
    q, d_y = refs.query[0, rows], refs.d_output[rows]
    k, v = refs.key[0, columns], refs.value[0, columns]
    scale = spec.scale * math.log2(math.e)
    s = vectors.product(k, q, (1, 1)) * scale
    s = self._masked(s, rows, columns, offset)
    p = jnp.exp2(s - refs.log2_total[:, rows])
    refs.sum_value[columns] += vectors.product(p.astype(d_y.dtype), d_y, (1, 0))
    d_s = p * (vectors.product(v, d_y, (1, 1)) - refs.delta[:, rows])
    d_s = d_s.astype(q.dtype)
    refs.sum_key[columns] += vectors.product(d_s, q, (1, 0))
    d_q = vectors.product(d_s, k, (0, 0))
    if not fresh:
      d_q = refs.sum_query[slot, rows] + d_q
    refs.sum_query[slot, rows] = d_q

  def _masked(
    self, s: Array, rows: Any, columns: Any, offset: int | None
  ) -> Array:
    """Attention logits [keys, queries] of a tile, hidden where they must be."""
    refs, rule, width = self.refs, self.spec.rule, s.shape[1]
    ids = None
    if refs.query_ids is not None:
      of_keys = vectors.broadcast_lanes(refs.id_columns[columns], width)
      ids = (of_keys, refs.query_ids[0, :, rows])
    # If causality is the only rule, keys left of the diagonal need no mask.
    free = 0
    if offset is not None and not rule.window and not rule.segments:
      free = offset
    if ids is None and offset is None:
      return s
    shift = None if offset is None else offset - free
    hidden = masks.hide(s[free:], rule, shift, 1, ids)
    return jnp.concatenate([s[:free], hidden]) if free else hidden
