"""One query to a cache on TPU: pages that no head needs are never copied.

The grid walks rows, kv heads and pages of keys. A table made beforehand names
the page that each of its steps has in fast memory: its own where it needs
that, and otherwise the one that is there already. The pipeline copies a page
only when its name changes, so heads that the gate silences and pages behind a
row's length or window cost a step of the grid and no memory traffic.

The cache is [B, K, S, H]: one head's page is then whole tiles. Read `decode.py`
for when a head may be skipped.
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

from gated_jax.chips import LANES

SMALLEST = 16  # tokens of a page: a tile of bfloat16 has so many rows
LOWEST = -1e30  # stands for -inf, which minus itself is not a number


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
  """Static options."""

  page: int = 1024  # tokens that are copied at once; fewer in a small cache
  window: int = 0  # keys that the query sees; 0: all
  interpret: bool = False  # run without a TPU


def page_of(room: int, spec: DecodeSpec) -> int:
  """The largest power of two that divides a cache's room, up to spec.page."""
  return min(spec.page, room & -room)


def page_table(
  cache_length: Int[Array, ' B'],
  skipped: Bool[Array, 'B K'],
  pages: int,
  spec: DecodeSpec,
) -> tuple[Bool[Array, ' steps'], Int[Array, ' steps']]:
  """Which steps of the grid need their page, and the page each one holds.

  Args:
    cache_length: tokens of each row in the cache, the query's own included.
    skipped: kv heads that are not read.
    pages: number of pages in a row.
    spec: page and window.

  Returns:
    For step (b * K + k) * pages + i, whether it reads page i of head k of
    row b, and the number of the step whose page it holds.
  """
  first = jnp.arange(pages) * spec.page
  needed = first < cache_length[:, None]
  if spec.window:
    needed &= first + spec.page > cache_length[:, None] - spec.window
  wanted = (needed[:, None] & ~skipped[..., None]).reshape(-1)
  steps = jnp.arange(wanted.size, dtype=jnp.int32)
  held = jax.lax.cummax(jnp.where(wanted, steps, 0))
  return wanted, held


def attend(
  query: Float[Array, 'B N H'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S V'],
  scores: Float[Array, 'B N #V'],
  cache_length: Int[Array, ' B'],
  skipped: Bool[Array, 'B K'],
  spec: DecodeSpec = DecodeSpec(),
) -> Float[Array, 'B N V']:
  """Gated attention of one token of each row; zeros for skipped heads.

  Args:
    query: [B, N, H].
    key: the cache's keys.
    value: the cache's values.
    scores: the gate's, after its activation.
    cache_length: tokens of each row in the cache, the query's own included.
    skipped: kv heads that are not read.
    spec: static options.

  Raises:
    NotImplementedError: the cache has no whole pages.
  """
  b, n, h = query.shape
  k, s, v = value.shape[1:]
  page = page_of(s, spec)
  if page < SMALLEST:
    raise NotImplementedError(
      f'a cache with room for {s} tokens has no pages of {SMALLEST}'
    )
  spec = dataclasses.replace(spec, page=page)
  grid = _Grid(b, k, s // page)
  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    cache_length = cache_length.astype(jnp.int32)
    wanted, held = page_table(cache_length, skipped, grid.pages, spec)
    tables = wanted.astype(jnp.int32), held, cache_length
    scores = jnp.broadcast_to(scores.astype(jnp.float32), (b, n, v))
    output = _run(
      grid,
      spec,
      tables,
      (
        query.reshape(b, k, n // k, h),
        key,
        value,
        scores.reshape(b, k, n // k, v),
      ),
    )
  return output.reshape(b, n, v)


def _run(
  grid: '_Grid',
  spec: DecodeSpec,
  tables: tuple[Array, Array, Array],
  arrays: tuple[Array, Array, Array, Array],
) -> Array:
  """The kernel on query, key, value and scores, grouped by kv head."""
  query, _, value, _ = arrays
  group, h = query.shape[2:]
  page, v = spec.page, value.shape[3]
  return pl.pallas_call(
    functools.partial(_kernel, grid=grid, scale=h**-0.5, spec=spec),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(grid.rows, grid.heads, grid.pages),
      in_specs=[
        pl.BlockSpec((1, 1, group, h), grid.head_at),
        pl.BlockSpec((1, 1, page, h), grid.page_at),
        pl.BlockSpec((1, 1, page, v), grid.page_at),
        pl.BlockSpec((1, 1, group, v), grid.head_at),
      ],
      out_specs=pl.BlockSpec((1, 1, group, v), grid.head_at),
      scratch_shapes=[
        pltpu.VMEM((group, LANES), jnp.float32),
        pltpu.VMEM((group, LANES), jnp.float32),
        pltpu.VMEM((group, v), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((*query.shape[:3], v), query.dtype),
    interpret=spec.interpret,
    name='gated_decode',
  )(*tables, *arrays)


@dataclasses.dataclass(frozen=True)
class _Grid:
  """Steps (row, head, i), and the block that each of them has."""

  rows: int
  heads: int
  pages: int  # number of pages of a row

  def number(self, row: Any, head: Any, i: Any) -> Any:
    """The step's number in the order of the grid."""
    return (row * self.heads + head) * self.pages + i

  def head_at(self, row: Any, head: Any, i: Any, *_: Any) -> Any:
    """The block of arrays that have one for each head."""
    del i
    return row, head, 0, 0

  def page_at(
    self, row: Any, head: Any, i: Any, wanted: Any, held: Any, length: Any
  ) -> Any:
    """The page that the table names."""
    del wanted, length
    of_row, page = _divide(held[self.number(row, head, i)], self.pages)
    return *_divide(of_row, self.heads), page, 0


def _divide(x: Any, y: int) -> tuple[Any, Any]:
  """Quotient and remainder of a number that is not negative."""
  return jax.lax.div(x, jnp.int32(y)), jax.lax.rem(x, jnp.int32(y))


def _kernel(*refs: Any, grid: _Grid, scale: float, spec: DecodeSpec) -> None:
  """One page of one head: softmax so far, and at the end the gate."""
  wanted, _, cache_length, query, key, value, scores, output, *carried = refs
  top, total, sums = carried
  row, head, i = (pl.program_id(axis) for axis in range(3))

  @pl.when(i == 0)
  def start() -> None:
    """Clears the running softmax before a row's first page."""
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  @pl.when(wanted[grid.number(row, head, i)] != 0)
  def mix() -> None:
    """Takes one page of keys into the running softmax."""
    logits = scale * jax.lax.dot_general(
      query[0, 0],
      key[0, 0],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    at = i * spec.page + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    visible = at < cache_length[row]
    if spec.window:
      visible &= at >= cache_length[row] - spec.window
    logits = jnp.where(visible, logits, LOWEST)
    before = top[:, :1]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(logits - now), 0.0)
    decay = jnp.exp(before - now)
    added = jnp.sum(weights, axis=1, keepdims=True)
    total[...] = total[...] * decay + added
    sums[...] = sums[...] * decay + jax.lax.dot_general(
      weights.astype(value.dtype),
      value[0, 0],
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    top[...] = jnp.broadcast_to(now, top.shape)

  @pl.when(i == pl.num_programs(2) - 1)
  def finish() -> None:
    """Divides by the softmax's sum, gates, and writes the head's output."""
    # A skipped head has read nothing, and its output is zero.
    weight = total[:, :1]
    result = sums[...] / jnp.where(weight == 0, 1.0, weight)
    output[0, 0] = (result * scores[0, 0]).astype(output.dtype)
