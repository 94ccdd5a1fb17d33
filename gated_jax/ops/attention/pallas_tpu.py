"""Flash attention for TPU with the gate inside: own Pallas kernels.

    Y = softmax(scale * Q K^T + mask) V          Y' = Y * act(G)

Queries, keys, values, gate logits and outputs lie as the projections make
them, [B, T, N, H]: a head is a block of H columns of [B, T, N H], so nothing
is transposed around the kernel. Forward's last step multiplies by the gate
and writes Y' and the log-sum-exp, nothing else. Backward's first step makes
the gradients of Y and of G, and delta, from Y' (`vjp.py` has the algebra).

`pallas_tpu_blocks.py` says how the matrix is cut and what is hidden,
`pallas_tpu_backward.py` has the other kernel.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.attention import pallas_tpu_backward
from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention import vjp
from gated_jax.ops.attention.pallas_tpu_blocks import LANES
from gated_jax.ops.attention.pallas_tpu_blocks import Call
from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.attention.spec import refuse
from gated_jax.ops.gate import apply_gate
from gated_jax.ops.gate import apply_scores

# Documents that no caller names: padding among queries, and among keys.
PADDED_QUERY = -(2**31)
PADDED_KEY = PADDED_QUERY + 1


def attend(
  inputs: Inputs,
  masking: Masking,
  spec: AttentionSpec,
  *,
  blocks: cut.Blocks | None = None,
  interpret: Any = False,
) -> Result:
  """See gated_jax/ops/attention/spec.py.

  Args:
    inputs, masking, spec: as there.
    blocks: how to cut; None: as the table says for this device.
    interpret: run without a TPU, slowly; or pltpu.InterpretParams.
  """
  query, key, value, gate = inputs
  b, t, n, h = query.shape
  s, k = key.shape[1:3]
  refuse(
    'pallas_tpu',
    dropout=spec.dropout > 0,
    an_arbitrary_mask=masking.mask is not None,
    query_offset=masking.query_offset is not None,
    float16=query.dtype == jnp.float16,
    float64=query.dtype == jnp.float64,
    head_dim_above_256=h > 256,
    values_of_another_width=value.shape[3] != h,
  )
  queries, keys = cut.pad_to(t), cut.pad_to(s)
  segments = _segments(masking, (b, t, s), (queries, keys), spec.causal)
  call = Call(
    queries=queries,
    keys=keys,
    heads=n,
    kv_heads=k,
    head_dim=h + -h % LANES,
    scale=spec.logit_scale(h),
    rule=cut.Rule(spec.causal, spec.window, segments is not None),
    gated='none' if gate is None else _kind(gate),
    gate=spec.gate,
    blocks=(blocks or cut.for_device()).fit(queries, keys),
    interpret=interpret,
  )
  output, lse = _attend(call, (query, key, value), gate, segments)
  return Result(output, lse if spec.return_lse else None)


def _kind(gate: Array) -> str:
  return 'headwise' if gate.shape[-1] == 1 else 'elementwise'


def _segments(masking, sizes, padded, causal):
  """Rows of document numbers [B, 1, T'], where anything needs them."""
  b, t, s = sizes
  # Padded keys lie after all queries, so causality alone can hide them.
  hidden = padded[1] == s or (causal and t <= s)
  if masking.query_segments is not None:
    ids = (masking.query_segments, masking.kv_segments)
  elif not hidden:
    ids = (jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32))
  else:
    return None
  numbers = (PADDED_QUERY, PADDED_KEY)
  return tuple(
    jnp.pad(
      i.astype(jnp.int32),
      ((0, 0), (0, p - i.shape[1])),
      constant_values=c,
    )[:, None]
    for i, p, c in zip(ids, padded, numbers, strict=True)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, inputs, gate, segments):
  return _forward(call, inputs, gate, segments)[0]


def _forward(call, inputs, gate, segments):
  inside = vjp.saves_gated(gate, call.gate)
  length = inputs[0].shape[1]
  query, key, value = inputs
  arrays = [lay(query, call.queries, call.head_dim)]
  arrays += [lay(x, call.keys, call.head_dim) for x in (key, value)]
  if gate is not None and inside:
    arrays.append(lay_gate(gate, call))
  kept, lse = forward(call, arrays, segments, gated=inside)
  kept = unlay(checkpoint_name(kept, OUTPUT_NAME), inputs[0].shape)
  lse = checkpoint_name(lse[:, :, 0, :length], LSE_NAME)
  # Where backward needs the ungated output, that is what is kept, and the
  # gate is a product of its own which remat can repeat.
  gated = kept if inside else apply_gate(kept, gate, call.gate)
  return (gated, lse), (inputs, gate, segments, kept, lse)


def _backward(call, saved, gradients):
  inputs, gate, segments, kept, lse = saved
  d_gated, d_lse = gradients
  query, key, value = inputs
  arrays = [lay(x, call.keys, call.head_dim) for x in (key, value)]
  for x in (query, d_gated, kept):
    arrays.append(lay(x, call.queries, call.head_dim))
  if gate is not None:
    arrays.append(lay_gate(gate, call))
  pad = ((0, 0), (0, 0), (0, call.queries - lse.shape[2]))
  rows = [jnp.pad(x, pad)[:, :, None] for x in (lse, d_lse)]
  *found, d_gate = pallas_tpu_backward.backward(call, arrays, rows, segments)
  d_inputs = tuple(
    unlay(d, x.shape) for d, x in zip(found, inputs, strict=True)
  )
  if d_gate is not None:
    d_gate = unlay_gate(d_gate, gate)
  return d_inputs, d_gate, None


_attend.defvjp(_forward, _backward)


def lay(x: Array, length: int, head_dim: int) -> Array:
  """[B, T, N, H] to [B, T', N H'], as it lies unless something is padded."""
  extra = (length - x.shape[1], head_dim - x.shape[3])
  x = jnp.pad(x, ((0, 0), (0, extra[0]), (0, 0), (0, extra[1])))
  return x.reshape(x.shape[0], length, -1)


def unlay(x: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `lay`."""
  b, length, heads, width = shape
  return x.reshape(b, x.shape[1], heads, -1)[:, :length, :, :width]


def lay_gate(gate: Array, call: Call) -> Array:
  """Elementwise as `lay`; headwise [B, T, N, 1] to rows [B, N, 1, T']."""
  if call.gated == 'elementwise':
    return lay(gate, call.queries, call.head_dim)
  rows = jnp.swapaxes(gate[..., 0], 1, 2)[:, :, None].astype(jnp.float32)
  pad = ((0, 0), (0, 0), (0, 0), (0, call.queries - rows.shape[-1]))
  return jnp.pad(rows, pad)


def unlay_gate(d_gate: Array, gate: Array) -> Array:
  """The inverse of `lay_gate`, in the gate's dtype."""
  if d_gate.ndim == 3:
    return unlay(d_gate, gate.shape)
  rows = d_gate[:, :, 0, : gate.shape[1]]
  return jnp.swapaxes(rows, 1, 2)[..., None].astype(gate.dtype)


def forward(
  call: Call,
  arrays: list[Array],
  segments: tuple[Array, Array] | None,
  gated: bool,
) -> tuple[Float[Array, 'B T NH'], Float[Array, 'B N 1 T']]:
  """The kernel on laid arrays: query, key, value and, where gated, gate."""
  blocks, h = call.blocks, call.head_dim
  query = arrays[0]
  batch, rows = query.shape[0], blocks.queries
  part = cut.resident_part(call.keys, blocks.keys, blocks.resident)
  first, last = _parts(call, part)
  steps = max(last(i) - first(i) + 1 for i in range(call.queries // rows))

  def at(i, j):
    return jnp.maximum(last(i) - j, first(i))

  one = pl.BlockSpec((1, rows, h), lambda b, n, i, j, *_: (b, i, n))
  row = pl.BlockSpec((1, 1, 1, rows), lambda b, n, i, j, *_: (b, n, 0, i))
  kv = pl.BlockSpec(
    (1, part, h), lambda b, n, i, j, *_: (b, at(i, j), lax.div(n, call.group))
  )
  specs = [one, kv, kv]
  if len(arrays) == 4:
    specs.append(one if call.gated == 'elementwise' else row)
  scratch = [pltpu.VMEM((rows, LANES), jnp.float32)] * 2
  scratch.append(pltpu.VMEM((rows, h), jnp.float32))
  tables: list[Array] = []
  if segments is not None:
    tables = [
      cut.spans(segments[0], rows),
      cut.spans(segments[1], blocks.keys),
    ]
    specs += [
      pl.BlockSpec((1, 1, rows), lambda b, n, i, j, *_: (b, 0, i)),
      pl.BlockSpec((1, 1, part), lambda b, n, i, j, *_: (b, 0, at(i, j))),
    ]
    scratch.append(pltpu.VMEM((rows, LANES), jnp.int32))
    arrays = [*arrays, *segments]
  shapes = [
    jax.ShapeDtypeStruct(query.shape, query.dtype),
    jax.ShapeDtypeStruct((batch, call.heads, 1, call.queries), jnp.float32),
  ]
  return pl.pallas_call(
    functools.partial(
      _forward_kernel,
      call=call,
      part=part,
      last=last,
      gate=gated and call.gated != 'none',
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(batch, call.heads, call.queries // rows, steps),
      in_specs=specs,
      out_specs=[one, row],
      scratch_shapes=scratch,
    ),
    out_shape=shapes,
    cost_estimate=call.cost(2, range(call.queries), [*arrays, *shapes]),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 3 + ('arbitrary',),
      vmem_limit_bytes=blocks.vmem_mib << 20,
    ),
    interpret=call.interpret,
    name='gated_attention_forward',
  )(*tables, *arrays)


def _parts(call, part):
  """First and last resident part of the keys that block i of queries sees."""
  rule, rows, parts = call.rule, call.blocks.queries, call.keys // part

  def first(i):
    if not rule.window:
      return 0 * i
    return cut.part_of(i * rows - rule.window + 1, part, parts)

  def last(i):
    if not rule.causal:
      return 0 * i + parts - 1
    return cut.part_of(i * rows + rows - 1, part, parts)

  return first, last


def _forward_kernel(*refs, call, part, last, gate):
  """One block of queries, one resident part of keys and values."""
  queue: list[Any] = list(refs)
  spans: Any = None
  if call.rule.segments:
    spans = (queue.pop(0), queue.pop(0), pl.program_id(0))
  query, key, value = (queue.pop(0) for _ in range(3))
  logits = queue.pop(0) if gate else None
  segments = (queue.pop(0), queue.pop(0)) if call.rule.segments else None
  output, lse, top, total, sums, *columns = queue
  blocks, rule, h = call.blocks, call.rule, call.head_dim
  block, step = blocks.queries, blocks.keys
  i, j = pl.program_id(2), pl.program_id(3)
  begin, near = i * block, (last(i) - j) * part  # positions
  scale = call.scale * math.log2(math.e)
  # All queries see the first strip of the diagonal, which lies in the part
  # that comes first: there is nothing before it that sums must start from.
  whole = rule.causal and not rule.window and part % block == 0
  whole = whole and call.queries <= call.keys

  @pl.when(j == 0)
  def begin_sums():
    if not whole:
      top[...] = jnp.full_like(top, cut.FLOOR)
      total[...] = jnp.zeros_like(total)
      sums[...] = jnp.zeros_like(sums)
    if segments is not None:
      columns[0][...] = cut.to_column(segments[0][0])

  def piece(start, width, rows, offset, fresh=False):
    """Keys start.. of the part, for a static slice of the queries."""
    lo, hi = rows
    keys = pl.ds(start, width)
    s = cut.product(query[0, lo:hi], key[0, keys], (1, 1)) * scale
    same = None
    if segments is not None:
      same = (cut.wide(columns[0][lo:hi], width), segments[1][0, :, keys])
    # Below the diagonal only causality hides nothing.
    edge = hi - lo
    if offset is not None and not rule.window and not rule.segments:
      edge = min(edge, width - offset)
    if same is not None or offset is not None:
      hidden = cut.hide(s[:edge], rule, offset, 0, same)
      s = jnp.concatenate([hidden, s[edge:]]) if edge < hi - lo else hidden
    now = jnp.max(s, axis=1, keepdims=True)
    before = jnp.full((hi - lo, LANES), cut.FLOOR) if fresh else top[lo:hi]
    now = jnp.maximum(before, now)
    p = jnp.exp2(s - cut.wide(now, width))
    across = sum(p[:, c : c + LANES] for c in range(0, width, LANES))
    v = value[0, keys]
    mixed = cut.product(p.astype(v.dtype), v, (1, 0))
    if not fresh:
      decay = jnp.exp2(before - now)
      across += decay * total[lo:hi]
      mixed += cut.wide(decay, h) * sums[lo:hi]
    top[lo:hi], total[lo:hi], sums[lo:hi] = now, across, mixed

  # The diagonal, and the far edge of a window.
  for group in cut.by_span(
    cut.key_strips(rule, block, blocks.strip, step), math.gcd(block, part)
  ):
    base = begin + group[0].start - near

    @pl.when((base >= 0) & (base < part) & (near + base >= 0))
    def _(group=group, base=base):
      for strip in group:
        at = pl.multiple_of(base + strip.start - group[0].start, blocks.strip)
        rows = (strip.first, strip.last)
        fresh = whole and strip.start == 0
        piece(at, strip.width, rows, strip.first - strip.start, fresh)

  # Keys that all of the queries see, in steps.
  end = jnp.int32(near + part)
  start = jnp.maximum(near, 0)  # below it, a step that has nothing to do
  if rule.causal:
    early, late = cut.key_steps(rule, block, step)
    start = jnp.maximum(begin + early, start)
    end = jnp.minimum(begin + late, end)

  def all_see(at):
    piece(at, step, (0, block), None)

  def some_may_see(at):
    """Nothing where the documents of queries and keys are all different."""
    near_step = lax.div(near + at, step)
    pl.when(cut.meet(spans, i, near_step))(lambda: all_see(at))

  cut.walk(start - near, end - near, step, some_may_see if spans else all_see)

  @pl.when(j == pl.num_programs(3) - 1)
  def finish():
    # One number a row: as rows, these are few vectors to compute with.
    weight = cut.to_row(jnp.sum(total[...], axis=1, keepdims=True))
    empty = weight == 0
    # The logarithm of zero is what it should be.
    lse[0, 0] = (jnp.log2(weight) + cut.to_row(top[...])) * math.log(2)
    share = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, weight))
    plain = not (call.gate.additive or call.gate.model_dtype)
    if logits is not None and call.gated == 'headwise' and plain:
      # One number a row as well, so both are turned into columns as one.
      share *= _scores(logits[0, 0], call, output.dtype)
    y = sums[...] * cut.wide(cut.to_column(share), h)
    if gate and not (call.gated == 'headwise' and plain):
      y = _gate_block(y, logits, call, output.dtype)
    output[0] = y.astype(output.dtype)


def _scores(logits, call, dtype):
  value = cut.activation_of(call.gate.activation, dtype).value
  return value(logits.astype(jnp.float32))


def _gate_block(y, logits, call, dtype):
  """act(logits) on a block of the output, rounded as the spec says."""
  headwise = call.gated == 'headwise'
  scores = _scores(logits[0, 0] if headwise else logits[0], call, dtype)
  if call.gate.model_dtype:
    scores = scores.astype(dtype).astype(jnp.float32)
    y = y.astype(dtype).astype(jnp.float32)
  if headwise:
    scores = cut.wide(cut.to_column(scores), call.head_dim)
  return apply_scores(y, scores, call.gate)
