"""Forward of gated flash attention in one TPU kernel.

A block of queries stays in VMEM and walks over the keys that it sees, with a
running maximum and sums. A resident part of keys and values is one step of the
grid; the part with the diagonal comes first. The last step divides by the sum
of the weights, multiplies by the gate, and writes the output.
"""

import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu import vectors
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.blocks import resident_part
from gated_jax.ops.gate import apply_scores


def forward(
  spec: KernelSpec,
  arrays: dict[str, Array],
  segments: tuple[Array, Array] | None,
) -> tuple[Float[Array, 'B T NV'], Float[Array, 'B N 1 T']]:
  """Output and log-sum-exp of packed arrays.

  Args:
    spec: what the kernel is compiled for.
    arrays: query, key and value, and gate_logits where the output is gated.
    segments: document numbers [B, 1, T'] and [B, 1, S'], or None.
  """
  blocks = spec.blocks
  batch, rows = arrays['query'].shape[0], blocks.queries
  parts = _Parts(spec)
  tables: dict[str, Array] = {}
  inputs = dict(arrays)
  scratch = {
    'maximum': pltpu.VMEM((rows, LANES), jnp.float32),
    'total': pltpu.VMEM((rows, LANES), jnp.float32),
    'sums': pltpu.VMEM((rows, spec.value_dim), jnp.float32),
  }
  if segments is not None:
    tables = {
      'query_spans': masks.segment_spans(segments[0], rows),
      'key_spans': masks.segment_spans(segments[1], blocks.keys),
    }
    inputs |= {'query_ids': segments[0], 'key_ids': segments[1]}
    scratch['id_columns'] = pltpu.VMEM((rows, LANES), jnp.int32)
  width = spec.heads * spec.value_dim
  outputs = {
    'output': jax.ShapeDtypeStruct(
      (batch, spec.queries, width), inputs['query'].dtype
    ),
    'lse': jax.ShapeDtypeStruct(
      (batch, spec.heads, 1, spec.queries), jnp.float32
    ),
  }
  specs = parts.block_specs()
  kernel = functools.partial(
    _kernel,
    names=(*tables, *inputs, *outputs, *scratch),
    spec=spec,
    parts=parts,
  )
  arrays_of_call = [*inputs.values(), *outputs.values()]
  output, lse = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(batch, spec.heads, spec.queries // rows, parts.steps),
      in_specs=[specs[name] for name in inputs],
      out_specs=[specs[name] for name in outputs],
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=list(outputs.values()),
    cost_estimate=spec.cost((1, 1), range(spec.queries), arrays_of_call),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 3 + ('arbitrary',),
      vmem_limit_bytes=blocks.vmem_mib << 20,
    ),
    interpret=spec.interpret,
    name='gated_attention_forward',
  )(*tables.values(), *inputs.values())
  return output, lse


class _Parts:
  """The resident parts of the keys, and which of them a step of the grid has.

  A step is (b, n, i, j): row, head, block of queries, and part of the keys,
  counted from the last part that the block sees.
  """

  def __init__(self, spec: KernelSpec):
    self.spec = spec
    self.size = resident_part(spec.keys, spec.blocks.keys, spec.blocks.resident)
    self.count = spec.keys // self.size
    blocks = range(spec.queries // spec.blocks.queries)
    # The most parts that any block of queries sees.
    self.steps = max(self.last(i) - self.first(i) + 1 for i in blocks)

  def first(self, i: Any) -> Any:
    """The first part that block i of queries sees."""
    rule, rows = self.spec.rule, self.spec.blocks.queries
    if not rule.window:
      return 0 * i
    return masks.part_of(i * rows - rule.window + 1, self.size, self.count)

  def last(self, i: Any) -> Any:
    """The last part that block i of queries sees."""
    rows = self.spec.blocks.queries
    if not self.spec.rule.causal:
      return 0 * i + self.count - 1
    return masks.part_of(i * rows + rows - 1, self.size, self.count)

  def at(self, i: Any, j: Any) -> Array:
    """The part that is fetched for step j of block i."""
    return jnp.maximum(self.last(i) - j, self.first(i))

  def block_specs(self) -> dict[str, pl.BlockSpec]:
    """The block of each array that a step has in VMEM."""
    spec, rows = self.spec, self.spec.blocks.queries

    def of_queries(width: int) -> pl.BlockSpec:
      return pl.BlockSpec((1, rows, width), lambda b, n, i, j, *_: (b, i, n))

    def of_keys(width: int) -> pl.BlockSpec:
      return pl.BlockSpec(
        (1, self.size, width),
        lambda b, n, i, j, *_: (b, self.at(i, j), lax.div(n, spec.group)),
      )

    row = pl.BlockSpec((1, 1, 1, rows), lambda b, n, i, j, *_: (b, n, 0, i))
    elementwise = spec.granularity == 'elementwise'
    return {
      'query': of_queries(spec.head_dim),
      'key': of_keys(spec.head_dim),
      'value': of_keys(spec.value_dim),
      'gate_logits': of_queries(spec.value_dim) if elementwise else row,
      'query_ids': pl.BlockSpec((1, 1, rows), lambda b, n, i, j, *_: (b, 0, i)),
      'key_ids': pl.BlockSpec(
        (1, 1, self.size), lambda b, n, i, j, *_: (b, 0, self.at(i, j))
      ),
      'output': of_queries(spec.value_dim),
      'lse': row,
    }


class _Refs(NamedTuple):
  """What the kernel reads and writes; None: this call has none of it."""

  query: Any
  key: Any
  value: Any
  output: Any
  lse: Any
  maximum: Any  # of the attention logits so far, [R, 128] of equal columns
  total: Any  # of the weights, [R, 128]: to be summed along lanes
  sums: Any  # of weights times values
  gate_logits: Any = None
  query_spans: Any = None
  key_spans: Any = None
  query_ids: Any = None
  key_ids: Any = None
  id_columns: Any = None  # query_ids as [R, 128] of equal columns


def _kernel(
  *refs: Any, names: tuple[str, ...], spec: KernelSpec, parts: _Parts
) -> None:
  """One block of queries with one resident part of keys and values."""
  i, j = pl.program_id(2), pl.program_id(3)
  step = _Step(
    _Refs(**dict(zip(names, refs, strict=True))),
    spec,
    parts.size,
    pl.program_id(0),
    i,
    begin=i * spec.blocks.queries,
    near=(parts.last(i) - j) * parts.size,
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
    """Whether sums start from the first strip of the diagonal, not from zero.

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
      self.take(at, step, (0, block), None)

    def visit_unless_hidden(at: Array) -> None:
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
    # With causality alone, rows below the diagonal need no mask.
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
