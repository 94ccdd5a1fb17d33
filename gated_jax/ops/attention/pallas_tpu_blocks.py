"""How the TPU kernels cut attention into pieces, and which keys are hidden.

Forward keeps a block of queries and walks over keys; backward keeps a block
of keys and walks over queries. Pieces in which every query sees every key are
taken in large steps without a mask, in a loop. What remains, the diagonal and
the far edge of a window, is cut finer, into strips whose place relative to
the block is known when the kernel is compiled: `key_strips`, `query_strips`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import chips
from gated_jax.ops.gate import ACTIVATIONS
from gated_jax.ops.gate import Activation
from gated_jax.ops.gate import GateSpec

LANES = 128
# A hidden logit lies far below FLOOR, where running maxima begin, so its
# weight is exactly zero even in rows that see nothing.
FLOOR = -1e30
HIDDEN = -2e30


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Numbers of queries and keys that the kernels take at a time."""

  # Forward: a block of queries walks over keys; strips cut the diagonal.
  queries: int = 2048
  keys: int = 512
  strip: int = 256
  resident: int = 4096  # keys and values that lie in VMEM
  # Backward: a block of keys walks over queries.
  back_queries: int = 512
  back_keys: int = 2048
  back_strip: int = 256
  back_resident: int = 4096  # queries, and keys, that lie in VMEM
  # Of VMEM: what a kernel may use, and dQ in float32 out of that.
  vmem_mib: int = 48
  dq_mib: float = 16.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if 'mib' in field.name:
        if value <= 0:
          raise ValueError(f'{field.name}={value} must be positive')
      elif value < LANES or value & (value - 1):
        raise ValueError(
          f'{field.name}={value} must be a power of two, at least {LANES}'
        )
    for small, large in (
      ('keys', 'resident'),
      ('strip', 'keys'),
      ('back_strip', 'back_queries'),
      ('back_queries', 'back_keys'),
      ('back_keys', 'back_resident'),
    ):
      if getattr(self, small) > getattr(self, large):
        raise ValueError(f'{small} must not exceed {large} in {self}')

  def fit(self, queries: int, keys: int) -> 'Blocks':
    """The same, cut down to what divides these padded lengths."""
    q, k = queries & -queries, keys & -keys
    chunk = min(self.keys, q, k)
    back_keys = min(self.back_keys, k)
    back_queries = min(self.back_queries, back_keys, q)
    return dataclasses.replace(
      self,
      queries=min(self.queries, q),
      keys=chunk,
      strip=min(self.strip, chunk),
      back_queries=back_queries,
      back_keys=back_keys,
      back_strip=min(self.back_strip, back_queries),
    )


def pad_to(length: int) -> int:
  """A length that blocks divide: up to 1024 as long as it pads little."""
  block = 1024
  while block > LANES and (-length % block) * 8 > length:
    block //= 2
  return length + -length % block


def resident_part(length: int, unit: int, limit: int) -> int:
  """Largest multiple of `unit` that divides length and is within limit."""
  parts = range(unit, min(length, limit) + 1, unit)
  return max((p for p in parts if length % p == 0), default=unit)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which keys a query sees, as far as it is known before the call."""

  causal: bool
  window: int
  segments: bool


@dataclasses.dataclass(frozen=True)
class Call:
  """All that a kernel is told before it is compiled. Lengths are padded."""

  queries: int
  keys: int
  heads: int
  kv_heads: int
  head_dim: int
  scale: float
  rule: Rule
  gated: str  # 'none', 'elementwise', 'headwise'
  gate: GateSpec
  blocks: Blocks  # that fit the lengths
  interpret: Any

  @property
  def group(self) -> int:
    """Query heads for each kv head."""
    return self.heads // self.kv_heads

  def cost(
    self, products: int, queries: range, arrays: list[Any]
  ) -> pl.CostEstimate:
    """What XLA is told of a call that makes so many products of [T, S].

    Only pairs that causality and window leave are counted: what is done
    beside them to have whole blocks is the kernel's own business.
    """
    last = np.asarray(queries) + 1
    seen = (
      np.minimum(last, self.keys) if self.rule.causal else self.keys + 0 * last
    )
    if self.rule.window:
      seen = np.clip(self.keys - last + self.rule.window, 0, None)
      seen = np.minimum(np.minimum(last, self.rule.window), seen)
    pairs = int(seen.sum()) * self.heads * arrays[0].shape[0]
    return pl.CostEstimate(
      flops=2 * products * self.head_dim * pairs,
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


@dataclasses.dataclass(frozen=True)
class Strip:
  """A narrow piece along a block, placed relative to the block's start.

  Forward: `width` keys from `start`, which rows first..last of the block of
  queries see. Backward: `width` queries from `start`, which see keys
  first..last of the block of keys.
  """

  start: int
  width: int
  first: int
  last: int


def key_strips(rule: Rule, block: int, width: int, step: int) -> list[Strip]:
  """What a causal block of queries sees beside the keys of `key_steps`."""
  if not rule.causal:
    return []
  early, _ = key_steps(rule, block, step)
  starts = range(0, block, width)
  if rule.window:
    starts = range(-_up(rule.window - 1, width), block, width)
  strips = []
  for start in starts:
    if rule.window and early <= start < 0:
      continue
    last = block
    if rule.window:
      last = min(block, _up(start + width + rule.window - 1, LANES))
    strips.append(Strip(start, width, max(0, start), last))
  return strips


def key_steps(rule: Rule, block: int, step: int) -> tuple[int, int]:
  """Range of keys, relative to a causal block, that all its queries see."""
  if not rule.window:
    return -(2**30), 0
  return min(0, -((rule.window - block) // step) * step), 0


def query_strips(rule: Rule, block: int, width: int, step: int) -> list[Strip]:
  """What of a causal block of keys is seen outside of `query_steps`."""
  if not rule.causal:
    return []
  _, late = query_steps(rule, block, step)
  starts = range(0, block, width)
  if rule.window:
    starts = range(0, block + _up(rule.window - 1, width), width)
  strips = []
  for start in starts:
    if rule.window and block <= start < late:
      continue
    first = 0
    if rule.window:
      first = max(0, (start - rule.window + 1) // LANES * LANES)
    strips.append(Strip(start, width, first, min(block, start + width)))
  return strips


def query_steps(rule: Rule, block: int, step: int) -> tuple[int, int]:
  """Range of queries, relative to a causal block, that see all its keys."""
  if not rule.window:
    return block, 2**30
  return block, max(block, block + (rule.window - block) // step * step)


def walk(
  start: Array, end: Array | int, step: int, piece: Callable[[Array], None]
) -> None:
  """Calls piece(start), piece(start + step), .. below end; maybe never."""

  def body(i, _):
    piece(pl.multiple_of(start + i * step, step))

  lax.fori_loop(0, lax.div(end - start, step), body, None)


def spans(ids: Int[Array, 'B 1 L'], width: int) -> Int[Array, 'B 2 C']:
  """The least and the largest document number of each stretch of `width`."""
  stretches = ids.reshape(ids.shape[0], -1, width)
  return jnp.stack([stretches.min(-1), stretches.max(-1)], axis=1)


def meet(tables: tuple[Any, Any, Any], i: Any, j: Any) -> Array:
  """Whether stretches i and j may share a document.

  Args:
    tables: `spans` of one and of the other, and which row of them is meant.
    i: a stretch of the one.
    j: a stretch of the other.
  """
  first, second, row = tables
  return (first[row, 0, i] <= second[row, 1, j]) & (
    second[row, 0, j] <= first[row, 1, i]
  )


def part_of(x: Any, part: int, parts: int) -> Any:
  """Which of the parts holds position x, the nearest where none does."""
  if isinstance(x, int):
    return min(max(x, 0) // part, parts - 1)
  # What jnp's // does for negative numbers, a kernel need not.
  return jnp.minimum(lax.div(jnp.maximum(x, 0), part), parts - 1)


def by_span(strips: list[Strip], span: int) -> list[list[Strip]]:
  """The strips, those together that lie in one part of `span`."""
  groups: dict[int, list[Strip]] = {}
  for strip in strips:
    groups.setdefault(strip.start // span, []).append(strip)
  return list(groups.values())


def hide(
  logits: Float[Array, 'R C'],
  rule: Rule,
  offset: int | None,
  queries: int,
  segments: tuple[Int[Array, 'R _'], Int[Array, '_ C']] | None,
) -> Float[Array, 'R C']:
  """The one mask of all kernels: HIDDEN where a query must not see a key.

  Args:
    logits: of one piece.
    rule: what is hidden.
    offset: position of its first query less that of its first key; None
      where causality and window hide nothing.
    queries: the axis of queries, 0 forward and 1 backward.
    segments: numbers of rows and columns, where the rule has them.
  """
  visible = None
  if offset is not None:
    shape = logits.shape
    ahead = lax.broadcasted_iota(jnp.int32, shape, queries)
    ahead -= lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    visible = ahead >= -offset
    if rule.window:
      visible &= ahead < rule.window - offset
  if segments is not None:
    same = segments[0] == segments[1]
    visible = same if visible is None else visible & same
  return logits if visible is None else jnp.where(visible, logits, HIDDEN)


def _sigmoid(x: Array) -> Array:
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def _one_less_sigmoid(x: Array) -> Array:
  return 0.5 - 0.5 * jnp.tanh(0.5 * x)


def _slope(x: Array) -> Array:
  return _sigmoid(x) * _one_less_sigmoid(x)


# Activations by one tanh, which value and derivative share, in place of two
# exponentials and two divisions: a third of the work. Right to 1e-7 of one,
# which is far below what 16 bits can hold of a product with Y, but not to
# 1e-7 of itself where the gate is shut.
_FAST = {
  'sigmoid': Activation(_sigmoid, _slope, _one_less_sigmoid),
  'two_sigmoid': Activation(
    lambda x: 2 * _sigmoid(x), lambda x: 2 * _slope(x), _one_less_sigmoid
  ),
  'ns_sigmoid': Activation(
    lambda x: 0.5 + 0.5 * _sigmoid(x),
    lambda x: 0.5 * _slope(x),
    lambda x: _slope(x) / (1 + _sigmoid(x)),
  ),
  'silu': Activation(
    lambda x: x * _sigmoid(x),
    lambda x: _sigmoid(x) * (1 + x * _one_less_sigmoid(x)),
    None,
  ),
}


def activation_of(name: str, dtype: jnp.dtype) -> Activation:
  """How kernels on arrays of this dtype compute an activation."""
  narrow = jnp.finfo(dtype).bits < 32
  return (narrow and _FAST.get(name)) or ACTIVATIONS[name]


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """Matrix product in float32, contracting these axes of a and b."""
  exact = jnp.float32 in (a.dtype, b.dtype)
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def to_row(column: Array) -> Array:
  """[R, 1] or [R, 128] of equal columns to [1, R].

  What lies on the diagonal of each square, summed along it: a few vector
  operations, where a transpose would take the whole square through the
  cross-lane unit.
  """
  squares = range(0, column.shape[0], LANES)
  return jnp.concatenate(
    [
      jnp.sum(_on_diagonal(column[r : r + LANES]), axis=0, keepdims=True)
      for r in squares
    ],
    axis=1,
  )


def to_column(row: Array) -> Array:
  """[1, R] to [R, 128] of equal columns."""
  squares = range(0, row.shape[1], LANES)
  columns = [
    jnp.sum(_on_diagonal(row[:, r : r + LANES]), axis=1, keepdims=True)
    for r in squares
  ]
  return jnp.concatenate([jnp.broadcast_to(c, (LANES, LANES)) for c in columns])


def _on_diagonal(x: Array) -> Array:
  square = (LANES, LANES)
  diagonal = lax.broadcasted_iota(jnp.int32, square, 0)
  diagonal = diagonal == lax.broadcasted_iota(jnp.int32, square, 1)
  return jnp.where(diagonal, x, jnp.zeros_like(x))


def wide(column: Array, width: int) -> Array:
  """[R, 128] of equal columns to [R, width]."""
  if width <= LANES:
    return column[:, :width]
  return jnp.concatenate([column] * (width // LANES), axis=1)


def _up(x: int, unit: int) -> int:
  return x + -x % unit


# Block sizes by the name of a TPU, chosen by the compiler's schedules
# (docs/kernels.md). The first row is for hosts that interpret the kernels.
TABLE: dict[str, Blocks] = {
  '': Blocks(queries=1024, back_keys=1024, back_resident=1024),
  **{
    name: Blocks(**tpu.attention_blocks)
    for name, tpu in chips.TPUS.items()
    if tpu.attention_blocks is not None
  },
}


def for_device() -> Blocks:
  """The table's row for the device that is compiled for."""
  devices = jax.sharding.get_abstract_mesh().abstract_device
  kind = devices.device_kind if devices else ''
  if not kind and jax.default_backend() == 'tpu':
    kind = jax.devices()[0].device_kind
  tpu = chips.find_tpu(kind)
  name = tpu.name if tpu else ''
  if kind.startswith('TPU') and name not in (TABLE.keys() - {''}):
    raise NotImplementedError(
      f'pallas_tpu attention cannot do this: no block sizes for {kind}'
    )
  return TABLE[name]
