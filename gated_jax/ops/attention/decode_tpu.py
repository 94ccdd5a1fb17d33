"""One query to a cache on TPU: pages that nobody needs are never copied.

The grid walks rows, kv heads and pages of keys. A table made beforehand names
the page that each of its steps has in fast memory: its own where it needs
that, and otherwise the one that is there already. The pipeline copies a page
only when its name changes, so heads that the gate silences and pages behind a
row's length or window cost a step of the grid and no memory traffic.

The cache is [B, K, S, H]: one head's page is then whole tiles. Read `decode.py`
for when a head may be left out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

LANES = 128
SMALLEST = 16  # tokens of a page: a tile of bfloat16 has so many rows
LOWEST = -1e30  # of a logit; -inf minus itself is no number


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
  """Static options."""

  page: int = 1024  # tokens that are copied at once; fewer in a small cache
  window: int = 0  # keys that the query sees; 0: all
  interpret: bool = False  # without a TPU


def page_of(room: int, spec: DecodeSpec) -> int:
  """The largest power of two that divides a cache's room, up to spec.page."""
  return min(spec.page, room & -room)


def page_table(
  lengths: Int[Array, ' B'],
  quiet: Bool[Array, 'B K'],
  pages: int,
  spec: DecodeSpec,
) -> tuple[Bool[Array, ' steps'], Int[Array, ' steps']]:
  """Which steps of the grid need their page, and the page each one holds.

  Args:
    lengths: tokens of each row in the cache, the query's own included.
    quiet: kv heads to leave out.
    pages: of a row.
    spec: page and window.

  Returns:
    For step (b * K + k) * pages + i, whether it reads page i of head k of
    row b, and the number of the step whose page it holds.
  """
  first = jnp.arange(pages) * spec.page
  needed = first < lengths[:, None]
  if spec.window:
    needed &= first + spec.page > lengths[:, None] - spec.window
  wanted = (needed[:, None] & ~quiet[..., None]).reshape(-1)
  steps = jnp.arange(wanted.size, dtype=jnp.int32)
  held = jax.lax.cummax(jnp.where(wanted, steps, 0))
  return wanted, held


def attend(
  query: Float[Array, 'B N H'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S H'],
  scores: Float[Array, 'B N #H'],
  lengths: Int[Array, ' B'],
  quiet: Bool[Array, 'B K'],
  spec: DecodeSpec = DecodeSpec(),
) -> Float[Array, 'B N H']:
  """Gated attention of one token of each row; zeros for quiet heads.

  Args:
    query: [B, N, H].
    key: the cache.
    value: likewise.
    scores: of the gate, after its activation.
    lengths: tokens of each row in the cache, the query's own included.
    quiet: kv heads to leave out.
    spec: static options.
  """
  b, n, h = query.shape
  k, s = key.shape[1:3]
  page = page_of(s, spec)
  if page < SMALLEST:
    raise NotImplementedError(
      f'a cache with room for {s} tokens has no pages of {SMALLEST}'
    )
  spec = dataclasses.replace(spec, page=page)
  pages, group = s // page, n // k
  wanted, held = page_table(lengths, quiet, pages, spec)

  def number(row, head, i):
    return (row * k + head) * pages + i

  def of_page(row, head, i, wanted, held, lengths):
    del wanted, lengths
    # No step is negative: what // does for signs a scalar unit need not.
    at_head, at_page = divide(held[number(row, head, i)], pages)
    return *divide(at_head, k), at_page, 0

  def divide(x, y):
    return jax.lax.div(x, jnp.int32(y)), jax.lax.rem(x, jnp.int32(y))

  def of_head(row, head, i, *_):
    del i
    return row, head, 0, 0

  kernel = functools.partial(_kernel, number=number, scale=h**-0.5, spec=spec)
  grouped = (b, k, group, h)
  whole = pl.BlockSpec((1, 1, group, h), of_head)
  pages_spec = pl.BlockSpec((1, 1, page, h), of_page)
  scores = jnp.broadcast_to(scores.astype(jnp.float32), query.shape)
  output: Any = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(b, k, pages),
      in_specs=[whole, pages_spec, pages_spec, whole],
      out_specs=whole,
      scratch_shapes=[
        pltpu.VMEM((group, LANES), jnp.float32),
        pltpu.VMEM((group, LANES), jnp.float32),
        pltpu.VMEM((group, h), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(grouped, query.dtype),
    interpret=spec.interpret,
    name='gated_decode',
  )(
    wanted.astype(jnp.int32),
    held,
    lengths.astype(jnp.int32),
    query.reshape(grouped),
    key,
    value,
    scores.reshape(grouped),
  )
  return output.reshape(b, n, h)


def _kernel(*refs, number, scale, spec):
  """One page of one head: softmax so far, and at the end the gate."""
  wanted, _, lengths, query, key, value, scores, output, *carried = refs
  top, total, mixed = carried
  row, head, i = (pl.program_id(axis) for axis in range(3))

  @pl.when(i == 0)
  def start():
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

  @pl.when(wanted[number(row, head, i)] != 0)
  def mix():
    logits = scale * jax.lax.dot_general(
      query[0, 0],
      key[0, 0],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    at = i * spec.page + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    visible = at < lengths[row]
    if spec.window:
      visible &= at >= lengths[row] - spec.window
    logits = jnp.where(visible, logits, LOWEST)
    before = top[:, :1]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(logits - now), 0.0)
    shrink = jnp.exp(before - now)
    added = jnp.sum(weights, axis=1, keepdims=True)
    total[...] = total[...] * shrink + added
    mixed[...] = mixed[...] * shrink + jax.lax.dot_general(
      weights.astype(value.dtype),
      value[0, 0],
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    top[...] = jnp.broadcast_to(now, top.shape)

  @pl.when(i == pl.num_programs(2) - 1)
  def finish():
    sums = total[:, :1]
    # Nothing was read for a head that is left out: its output is zero.
    result = mixed[...] / jnp.where(sums == 0, 1.0, sums)
    output[0, 0] = (result * scores[0, 0]).astype(output.dtype)
