"""One step of the forward kernel: a block of queries with a part of the keys.

`forward.py` has the arrays around the kernel.
"""

import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from gated_jax.chips import LANES
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu import vectors
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.forward_grid import Grid
from gated_jax.ops.gate import apply_scores


class _Refs(NamedTuple):
  """References to all arrays of the kernel; None: this call has no such."""

  query: Any
  key: Any
  value: Any
  output: Any
  lse: Any
  maximum: Any  # largest attention logit so far, [R, 128] of equal columns
  total: Any  # sums of weights, [R, 128]: still to be summed along lanes
  sums: Any  # sums of weights times values
  gate_logits: Any = None
  query_spans: Any = None
  key_spans: Any = None
  query_ids: Any = None
  key_ids: Any = None
  id_columns: Any = None  # query_ids as [R, 128] of equal columns


def kernel(
  *refs: Any, names: tuple[str, ...], spec: KernelSpec, grid: Grid
) -> None:
  """One block of queries with one resident part of keys and values."""
  i, j = pl.program_id(2), pl.program_id(3)
  step = _Step(
    _Refs(**dict(zip(names, refs, strict=True))),
    spec,
    grid.part,
    pl.program_id(0),
    i,
    begin=i * spec.blocks.queries,
    near=(grid.last(i) - j) * grid.part,
  )

  @pl.when(j == 0)
  def _() -> None:
    step.start()

  step.take_strips()
  step.take_steps()

  @pl.when(j == pl.num_programs(3) - 1)
  def _() -> None:
    step.finish()


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step of the grid; positions are those of the padded sequence."""

  refs: _Refs
  spec: KernelSpec
  part: int  # keys that are resident
  b: Any  # row of the batch
  i: Any  # block of queries
  begin: Any  # position of its first query
  near: Any  # position of the part's first key

  @property
  def first_strip_starts(self) -> bool:
    """True where sums start from the diagonal's first strip, not from zero.

    All queries see that strip, and it lies in the part that comes first.
    """
    spec = self.spec
    aligned = self.part % spec.blocks.queries == 0
    unmasked = spec.rule.causal and not spec.rule.window
    return unmasked and aligned and spec.queries <= spec.keys

  def start(self) -> None:
    """Sets the sums to nothing, and document numbers as columns."""
    refs = self.refs
    if not self.first_strip_starts:
      refs.maximum[...] = jnp.full_like(refs.maximum, masks.FLOOR)
      refs.total[...] = jnp.zeros_like(refs.total)
      refs.sums[...] = jnp.zeros_like(refs.sums)
    if refs.query_ids is not None:
      refs.id_columns[...] = vectors.to_column(refs.query_ids[0])

  def take_strips(self) -> None:
    """The diagonal, and the far edge of a window."""
    blocks, rule = self.spec.blocks, self.spec.rule
    block = blocks.queries
    strips = masks.key_strips(rule, block, blocks.strip, blocks.keys)
    for group in masks.group_by_span(strips, math.gcd(block, self.part)):
      base = self.begin + group[0].start - self.near
      inside = (base >= 0) & (base < self.part) & (self.near + base >= 0)

      @pl.when(inside)
      def _(group: list[masks.Strip] = group, base: Any = base) -> None:
        for strip in group:
          at = base + strip.start - group[0].start
          self.take(
            pl.multiple_of(at, blocks.strip),
            strip.width,
            (strip.first, strip.last),
            strip.first - strip.start,
            fresh=self.first_strip_starts and strip.start == 0,
          )

  def take_steps(self) -> None:
    """Keys that all of the queries see, in large steps."""
    blocks, rule, near = self.spec.blocks, self.spec.rule, self.near
    block, step = blocks.queries, blocks.keys
    end = jnp.int32(near + self.part)
    start = jnp.maximum(near, 0)  # a step below zero has nothing to do
    if rule.causal:
      early, late = masks.key_steps(rule, block, step)
      start = jnp.maximum(self.begin + early, start)
      end = jnp.minimum(self.begin + late, end)

    def visit(at: Array) -> None:
      """Takes a block of keys that needs no mask but documents."""
      self.take(at, step, (0, block), None)

    def visit_unless_hidden(at: Array) -> None:
      """Leaves out blocks that share no document."""
      refs = self.refs
      tables = (refs.query_spans, refs.key_spans, self.b)
      of_keys = lax.div(near + at, step)
      pl.when(masks.may_overlap(tables, self.i, of_keys))(lambda: visit(at))

    masks.for_each_step(
      start - near,
      end - near,
      step,
      visit_unless_hidden if rule.segments else visit,
    )

  def take(
    self,
    start: Any,
    width: int,
    rows: tuple[int, int],
    offset: int | None,
    fresh: bool = False,
  ) -> None:
    """Adds a tile to the running maximum and sums.

    Args:
      start: of its keys, in the part.
      width: number of its keys.
      rows: its first query and the one after its last, in the block.
      offset: as `masks.hide` has it.
      fresh: whether there are no sums yet.
    """
    refs, spec, rule = self.refs, self.spec, self.spec.rule
    lo, hi = rows
    keys = pl.ds(start, width)
    scale = spec.scale * math.log2(math.e)
    s = vectors.product(refs.query[0, lo:hi], refs.key[0, keys], (1, 1)) * scale
    ids = None
    if refs.key_ids is not None:
      of_rows = vectors.broadcast_lanes(refs.id_columns[lo:hi], width)
      ids = (of_rows, refs.key_ids[0, :, keys])
    # If causality is the only rule, rows below the diagonal need no mask.
    edge = hi - lo
    if offset is not None and not rule.window and not rule.segments:
      edge = min(edge, width - offset)
    if ids is not None or offset is not None:
      hidden = masks.hide(s[:edge], rule, offset, 0, ids)
      s = jnp.concatenate([hidden, s[edge:]]) if edge < hi - lo else hidden
    top = jnp.max(s, axis=1, keepdims=True)
    before = (
      jnp.full((hi - lo, LANES), masks.FLOOR) if fresh else refs.maximum[lo:hi]
    )
    top = jnp.maximum(before, top)
    p = jnp.exp2(s - vectors.broadcast_lanes(top, width))
    total = sum(p[:, c : c + LANES] for c in range(0, width, LANES))
    v = refs.value[0, keys]
    sums = vectors.product(p.astype(v.dtype), v, (1, 0))
    if not fresh:
      decay = jnp.exp2(before - top)
      total += decay * refs.total[lo:hi]
      decay = vectors.broadcast_lanes(decay, spec.value_dim)
      sums += decay * refs.sums[lo:hi]
    refs.maximum[lo:hi], refs.total[lo:hi], refs.sums[lo:hi] = top, total, sums

  def finish(self) -> None:
    """Normalises and gates the sums, and writes both results."""
    refs, spec = self.refs, self.spec
    # Numbers of a row are few vectors to compute with as rows.
    weight = vectors.to_row(jnp.sum(refs.total[...], axis=1, keepdims=True))
    top = vectors.to_row(refs.maximum[...])
    empty = weight == 0
    # log2(0) = -inf is the documented lse of a row that sees no key.
    refs.lse[0, 0] = (jnp.log2(weight) + top) * math.log(2)
    share = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, weight))
    plain = not (spec.gate.additive or spec.gate.model_dtype)
    in_share = spec.granularity == 'headwise' and plain
    if refs.gate_logits is not None and in_share:
      # The gate is one number a row too, so one column serves for both.
      share *= self._scores(refs.gate_logits[0, 0])
    share = vectors.to_column(share)
    y = refs.sums[...] * vectors.broadcast_lanes(share, spec.value_dim)
    if refs.gate_logits is not None and not in_share:
      y = self._gated(y)
    refs.output[0] = y.astype(refs.output.dtype)

  def _scores(self, gate_logits: Array) -> Array:
    dtype = self.refs.output.dtype
    activation = vectors.activation_of(self.spec.gate.activation, dtype)
    return activation.value(gate_logits.astype(jnp.float32))

  def _gated(self, y: Array) -> Array:
    """The gate on a block of the output, rounded as the spec says."""
    refs, spec, dtype = self.refs, self.spec, self.refs.output.dtype
    headwise = spec.granularity == 'headwise'
    block = refs.gate_logits[0, 0] if headwise else refs.gate_logits[0]
    scores = self._scores(block)
    if spec.gate.model_dtype:
      scores = scores.astype(dtype).astype(jnp.float32)
      y = y.astype(dtype).astype(jnp.float32)
    if headwise:
      columns = vectors.to_column(scores)
      scores = vectors.broadcast_lanes(columns, spec.value_dim)
    return apply_scores(y, scores, spec.gate)
