"""Gradients of gated flash attention in one TPU kernel.

    P  = exp(scale * Q K^T - lse)      dV = P^T dY
    dS = P * (dY V^T - delta)          dQ = scale * dS K    dK = scale * dS^T Q

Each product is computed once: a resident part of keys and values meets all
queries that see it, in turn for each query head of the group, so that dK and
dV are summed in VMEM and nothing is repeated for grouped heads. dQ is summed
in VMEM over the parts of keys. Matrices are held transposed, keys by queries,
so that delta and the log-sum-exp are rows, as they lie in memory. Where dQ of
a whole group does not fit, queries are taken a range at a time, one call for
each, and the ranges' dK and dV are added.

The prologue turns (gradient of Y', Y' or Y, gate logits) into dY, delta and
the gradient of the gate by `vjp.gate_backward`. With long keys it is repeated
for each resident part: less work than keeping dY.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention import vjp
from gated_jax.ops.attention.pallas_tpu_blocks import LANES
from gated_jax.ops.attention.pallas_tpu_blocks import Call


def backward(
  call: Call,
  arrays: list[Array],
  rows: list[Array],
  segments: tuple[Array, Array] | None,
) -> tuple[Array, Array, Array, Array | None]:
  """Gradients of query, key, value and gate, laid as the arrays are.

  Args:
    call: the static side.
    arrays: key, value, query, gradient of the gated output, what forward
      kept, and the gate's logits where there are any.
    rows: log-sum-exp and its gradient, [B, N, 1, T'].
    segments: document numbers [B, 1, T'] and [B, 1, S'], or None.
  """
  blocks = call.blocks
  fitting = int(blocks.dq_mib * 2**20) // (4 * call.group * call.head_dim)
  many = cut.resident_part(
    call.queries, blocks.back_queries, min(blocks.back_resident, fitting)
  )
  count = cut.resident_part(call.queries, many, fitting)
  ranges = [
    _some_queries(call, [*arrays, *rows], segments, (start, count, many))
    for start in range(0, call.queries, count)
  ]
  if len(ranges) == 1:
    return ranges[0]
  d_query, d_key, d_value, d_gate = zip(*ranges, strict=True)
  along = -1 if call.gated == 'headwise' else 1
  return (
    jnp.concatenate(d_query, axis=1),
    _add(d_key, arrays[0]),
    _add(d_value, arrays[1]),
    jnp.concatenate(d_gate, axis=along) if call.gated != 'none' else None,
  )


def _add(ranges, like):
  """The sum, where early queries see only the keys before them."""
  total = ranges[-1]
  for part in ranges[:-1]:
    total = total.at[:, : part.shape[1]].add(part)
  rest = like.shape[1] - total.shape[1]
  return jnp.pad(total, ((0, 0), (0, rest), (0, 0))).astype(like.dtype)


def _some_queries(call, inputs, segments, some):
  """All gradients that queries start..start + count contribute to."""
  start, count, many = some
  blocks, h = call.blocks, call.head_dim
  key, query = inputs[0], inputs[2]
  batch, whole = query.shape[0], count == call.queries
  part = cut.resident_part(call.keys, blocks.back_keys, blocks.back_resident)
  specs = _Specs(call, part, some)
  gated = call.gated != 'none'
  logits = specs.row if call.gated == 'headwise' else specs.query
  kinds = [specs.kv] * 2 + [specs.query] * 3 + [logits] * gated
  in_specs = [kind(specs.part_of_queries) for kind in kinds]
  in_specs += [specs.row(specs.part_of_queries)] * 2
  tables: list[Array] = []
  if segments is not None:
    tables = [
      cut.spans(segments[0], blocks.back_queries),
      cut.spans(segments[1], blocks.back_keys),
    ]
    inputs = [*inputs, *segments]
    in_specs += specs.segments()
  keys = (batch, specs.parts * part, key.shape[2])
  keys_type = key.dtype if whole else jnp.float32
  shapes = [jax.ShapeDtypeStruct(keys, keys_type)] * 2
  out_specs = [specs.kv(None)] * 2 + [specs.query(specs.once)]
  shapes.append(
    jax.ShapeDtypeStruct((batch, count, query.shape[2]), query.dtype)
  )
  if gated:
    out_specs.append(logits(specs.once))
    shape = shapes[-1].shape
    if call.gated == 'headwise':
      shape = (batch, call.heads, 1, count)
    shapes.append(jax.ShapeDtypeStruct(shape, inputs[5].dtype))
  sum_q = (call.group * (count // many), many, h)
  scratch = [
    pltpu.VMEM((part, h), jnp.float32),
    pltpu.VMEM((part, h), jnp.float32),
    pltpu.VMEM(sum_q, jnp.float32),
    pltpu.VMEM((many, h), query.dtype),
    pltpu.VMEM((1, many), jnp.float32),
    pltpu.VMEM((1, many), jnp.float32),
  ]
  if segments is not None:
    scratch.append(pltpu.VMEM((part, LANES), jnp.int32))
  d_key, d_value, d_query, *d_gate = pl.pallas_call(
    functools.partial(_kernel, call=call, part=part, some=some),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(batch, call.kv_heads, specs.parts, call.group, count // many),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=shapes,
    cost_estimate=call.cost(5, range(start, start + count), [*inputs, *shapes]),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 2 + ('arbitrary',) * 3,
      vmem_limit_bytes=(blocks.vmem_mib << 20) + 4 * math.prod(sum_q),
    ),
    interpret=call.interpret,
    name='gated_attention_backward',
  )(*tables, *inputs)
  return d_query, d_key, d_value, d_gate[0] if gated else None


class _Specs:
  """Which block of each array a grid step (b, k, j, g, i) sees."""

  def __init__(self, call: Call, part: int, some: tuple[int, int, int]):
    self.call, self.part = call, part
    start, count, self.many = some
    self.start, self.count = start // self.many, count // self.many
    # Keys after the last query are seen by none, but their gradient, zero,
    # is written by whoever writes all.
    self.parts = call.keys // part
    if call.rule.causal and count < call.queries:
      self.parts = min(self.parts, -(-(start + count) // part))

  def part_of_keys(self, j):
    """The last part first: part 0, which all queries see, comes last."""
    return self.parts - 1 - j

  def part_of_queries(self, j, g, i):
    """Those that see none of the keys are not fetched, until the end."""
    rule = self.call.rule
    begin = self.part_of_keys(j) * self.part
    first, last = 0, self.count - 1
    if rule.causal:
      first = self._within(begin)
    if rule.window:
      last = self._within(begin + self.part + rule.window - 2)
    i = jnp.where(j == self.parts - 1, i, jnp.clip(i, first, last))
    return g, self.start + i

  def _within(self, position):
    begin = self.start * self.many
    return cut.part_of(position - begin, self.many, self.count)

  def once(self, j, g, i):
    """For outputs that the last part of keys completes."""
    final = j == self.parts - 1
    return jnp.where(final, g, 0), jnp.where(final, i, 0)

  def query(self, which):
    def at(b, k, j, g, i, *_):
      g, i = which(j, g, i)
      return b, i, k * self.call.group + g

    return pl.BlockSpec((1, self.many, self.call.head_dim), at)

  def row(self, which):
    def at(b, k, j, g, i, *_):
      g, i = which(j, g, i)
      return b, k * self.call.group + g, 0, i

    return pl.BlockSpec((1, 1, 1, self.many), at)

  def kv(self, _):
    return pl.BlockSpec(
      (1, self.part, self.call.head_dim),
      lambda b, k, j, g, i, *_: (b, self.part_of_keys(j), k),
    )

  def segments(self):
    def query(b, k, j, g, i, *_):
      return b, 0, self.part_of_queries(j, g, i)[1]

    return [
      pl.BlockSpec((1, 1, self.many), query),
      pl.BlockSpec(
        (1, 1, self.part),
        lambda b, k, j, g, i, *_: (b, 0, self.part_of_keys(j)),
      ),
    ]


def _kernel(*refs, call, part, some):
  """One resident part of keys, one of the queries of one head."""
  queue: list[Any] = list(refs)
  gated = call.gated != 'none'
  spans: Any = None
  if call.rule.segments:
    spans = (queue.pop(0), queue.pop(0), pl.program_id(0))
  key, value, query, d_gated, kept = (queue.pop(0) for _ in range(5))
  logits = queue.pop(0) if gated else None
  lse, d_lse = queue.pop(0), queue.pop(0)
  segments = (queue.pop(0), queue.pop(0)) if call.rule.segments else None
  d_key, d_value, d_query = (queue.pop(0) for _ in range(3))
  d_gate = queue.pop(0) if gated else None
  sum_k, sum_v, sum_q, d_output, delta, log, *columns = queue
  blocks, rule = call.blocks, call.rule
  block, step = blocks.back_keys, blocks.back_queries
  j, g, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)
  parts, count = pl.num_programs(2), pl.num_programs(4)
  slot = g * count + i
  final = j == parts - 1
  first, _, many = some
  near, begin = (parts - 1 - j) * part, first + i * many  # positions
  scale = call.scale * math.log2(math.e)
  # Where parts are squares, a query meets the keys of its own square first,
  # those of its own block before others: its prologue stands there, among
  # matrix products that hide it, and dQ needs no zeros to start from.
  square = rule.causal and not rule.window and part == many
  square = square and call.queries == call.keys

  @pl.when((g == 0) & (i == 0))
  def start_keys():
    sum_k[...] = jnp.zeros_like(sum_k)
    sum_v[...] = jnp.zeros_like(sum_v)
    if segments is not None:
      columns[0][...] = cut.to_column(segments[1][0])

  @pl.when((j == 0) & (not square))
  def start_queries():
    sum_q[slot] = jnp.zeros(sum_q.shape[1:], jnp.float32)

  def prologue(at):
    rows = pl.ds(at, step)
    d_y, row, d_logits = vjp.gate_backward(
      d_gated[0, rows],
      kept[0, rows],
      _logits(logits, rows, call, kept.dtype) if gated else None,
      call.gate,
      cut.activation_of(call.gate.activation, kept.dtype),
      vjp.RowLayout(
        lambda x: cut.wide(cut.to_column(x), call.head_dim), cut.to_row
      ),
    )
    d_output[rows] = d_y
    delta[:, rows] = row - d_lse[0, 0, :, rows]
    # exp2(logits - lse) is zero in rows that see nothing.
    lifted = lse[0, 0, :, rows]
    lifted = jnp.where(lifted == -jnp.inf, -cut.FLOOR, lifted)
    log[:, rows] = lifted * math.log2(math.e)
    if d_gate is None or d_logits is None:
      return
    if call.gated == 'elementwise':
      d_gate[0, rows] = d_logits
    else:
      d_gate[0, 0, :, rows] = d_logits.astype(jnp.float32)

  def piece(at, width, chunk, keys, offset, fresh=False):
    """Queries at.. of the part, for a slice of the keys from chunk."""
    lo, hi = keys
    rows, columns_ = pl.ds(at, width), pl.ds(chunk + lo, hi - lo)
    q, d_y = query[0, rows], d_output[rows]
    k, v = key[0, columns_], value[0, columns_]
    s = cut.product(k, q, (1, 1)) * scale
    same = None
    if segments is not None:
      seen = cut.wide(columns[0][columns_], width)
      same = (seen, segments[0][0, :, rows])
    # Left of the diagonal only causality hides nothing.
    free = 0
    if offset is not None and not rule.window and not rule.segments:
      free = offset
    if same is not None or offset is not None:
      shift = None if offset is None else offset - free
      hidden = cut.hide(s[free:], rule, shift, 1, same)
      s = jnp.concatenate([s[:free], hidden]) if free else hidden
    p = jnp.exp2(s - log[:, rows])
    sum_v[columns_] += cut.product(p.astype(d_y.dtype), d_y, (1, 0))
    d_s = p * (cut.product(v, d_y, (1, 1)) - delta[:, rows])
    d_s = d_s.astype(q.dtype)
    sum_k[columns_] += cut.product(d_s, q, (1, 0))
    d_q = cut.product(d_s, k, (0, 0))
    sum_q[slot, rows] = d_q if fresh else sum_q[slot, rows] + d_q

  def chunk_of_keys(at):
    """All queries of the part that see one block of its keys, from the last."""
    chunk = part - block - at
    place = near + chunk
    for group in cut.by_span(
      cut.query_strips(rule, block, blocks.back_strip, step),
      math.gcd(block, many),
    ):
      base = place + group[0].start - begin

      @pl.when((base >= 0) & (base < many))
      def _(group=group, base=base):
        for strip in group:
          at = base + strip.start - group[0].start
          at = pl.multiple_of(at, blocks.back_strip)
          if square and strip.start % step == 0:
            prologue(at)
          keys = (strip.first, strip.last)
          piece(at, strip.width, chunk, keys, strip.start - strip.first, square)

    start, end = jnp.int32(begin), jnp.int32(begin + many)
    if rule.causal:
      early, late = cut.query_steps(rule, block, step)
      start = jnp.maximum(place + early, start)
      end = jnp.minimum(place + late, end)

    def all_seen(at):
      piece(at, step, chunk, (0, block), None)

    def some_may_be_seen(at):
      """Nothing where the documents of queries and keys are all different."""
      steps = lax.div(begin + at, step)
      of_keys = lax.div(place, block)
      pl.when(cut.meet(spans, steps, of_keys))(lambda: all_seen(at))

    cut.walk(
      start - begin, end - begin, step, some_may_be_seen if spans else all_seen
    )

  live = True
  if rule.causal:
    live = begin + many > near
  if rule.window:
    live &= begin < near + part + rule.window - 1
  if square:
    # In one part, all prologues stand on the diagonal.
    apart = (begin > near) if call.keys > part else False
  else:
    apart = final | live

  @pl.when(apart)
  def prologues():
    cut.walk(jnp.int32(0), many, step, prologue)

  @pl.when(live)
  def products():
    cut.walk(jnp.int32(0), part, block, chunk_of_keys)

  @pl.when(final)
  def end_queries():
    d_query[0] = (sum_q[slot] * call.scale).astype(d_query.dtype)

  @pl.when((g == pl.num_programs(3) - 1) & (i == count - 1))
  def end_keys():
    d_key[0] = (sum_k[...] * call.scale).astype(d_key.dtype)
    d_value[0] = sum_v[...].astype(d_value.dtype)


def _logits(logits, rows, call, dtype):
  """Of some rows: [R, H], or [1, R] where each has one."""
  if call.gated == 'elementwise':
    return logits[0, rows]
  row = logits[0, 0, :, rows]
  # Rows travel in float32, which rounds nothing; the spec may want it to.
  return row.astype(dtype) if call.gate.model_dtype else row
