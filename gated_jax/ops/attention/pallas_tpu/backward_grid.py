"""The grid of the backward kernel: which block of each array a step has.

A step is (b, k, j, g, i): row, kv head, part of the keys counted from the
last, query head of the group, and part of the queries of a range.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.blocks import resident_part

# (j, g, i) to the query head of the group, and the part of the queries.
Which = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class QueryRange:
  """The queries of one call; all three are numbers of tokens."""

  start: int
  count: int
  resident: int  # how many lie in VMEM at a time

  @property
  def parts(self) -> int:
    """Resident parts of the range."""
    return self.count // self.resident


class Grid:
  """Parts of the keys, and the block specs of all arrays."""

  def __init__(self, spec: KernelSpec, queries: QueryRange):
    blocks = spec.blocks
    self.spec, self.queries = spec, queries
    self.part = resident_part(spec.keys, blocks.back_keys, blocks.back_resident)
    self.first = queries.start // queries.resident  # part of the queries
    self.parts = spec.keys // self.part
    # No query sees keys after the last query; the call that covers all queries
    # writes their zero gradients.
    if spec.rule.causal and queries.count < spec.queries:
      end = queries.start + queries.count
      self.parts = min(self.parts, -(-end // self.part))

  def in_specs(self) -> dict[str, pl.BlockSpec]:
    """The block of each input."""
    spec = self.spec
    fetched = self._fetched_queries

    def of_query_ids(b: Any, k: Any, j: Any, g: Any, i: Any, *_: Any) -> Any:
      """The block of document numbers for a step's queries."""
      return b, 0, fetched(j, g, i)[1]

    def of_key_ids(b: Any, k: Any, j: Any, g: Any, i: Any, *_: Any) -> Any:
      """The block of document numbers for a step's keys."""
      return b, 0, self._part_of_keys(j)

    row = self._row(fetched)
    of_values = self._of_queries(spec.value_dim, fetched)
    return {
      'key': self._of_keys(spec.head_dim),
      'value': self._of_keys(spec.value_dim),
      'query': self._of_queries(spec.head_dim, fetched),
      'd_gated': of_values,
      'saved': of_values,
      'gate_logits': row if spec.granularity == 'headwise' else of_values,
      'lse': row,
      'd_lse': row,
      'query_ids': pl.BlockSpec((1, 1, self.queries.resident), of_query_ids),
      'key_ids': pl.BlockSpec((1, 1, self.part), of_key_ids),
    }

  def out_specs(self) -> dict[str, pl.BlockSpec]:
    """The block of each output."""
    spec = self.spec
    row = self._row(self._written_queries)
    of_values = self._of_queries(spec.value_dim, self._written_queries)
    return {
      'd_key': self._of_keys(spec.head_dim),
      'd_value': self._of_keys(spec.value_dim),
      'd_query': self._of_queries(spec.head_dim, self._written_queries),
      'd_gate_logits': row if spec.granularity == 'headwise' else of_values,
    }

  def _part_of_keys(self, j: Any) -> Any:
    """The last part comes first, and part 0, which all queries see, last."""
    return self.parts - 1 - j

  def _fetched_queries(self, j: Any, g: Any, i: Any) -> tuple[Any, Any]:
    """Queries that see none of the keys are not fetched, until the end."""
    rule = self.spec.rule
    begin = self._part_of_keys(j) * self.part
    first, last = 0, self.queries.parts - 1
    if rule.causal:
      first = self._part_of_range(begin)
    if rule.window:
      last = self._part_of_range(begin + self.part + rule.window - 2)
    i = jnp.where(j == self.parts - 1, i, jnp.clip(i, first, last))
    return g, self.first + i

  def _part_of_range(self, position: Any) -> Any:
    """Index in the range of the part of the queries that holds a position."""
    queries = self.queries
    begin = self.first * queries.resident
    return masks.part_of(position - begin, queries.resident, queries.parts)

  def _written_queries(self, j: Any, g: Any, i: Any) -> tuple[Any, Any]:
    """Outputs of queries are complete only with the last part of keys."""
    final = j == self.parts - 1
    return jnp.where(final, g, 0), jnp.where(final, i, 0)

  def _of_queries(self, width: int, which: Which) -> pl.BlockSpec:
    """Packed arrays [B, T, N H]."""

    def at(b: Any, k: Any, j: Any, g: Any, i: Any, *_: Any) -> Any:
      """The block that a step of the grid reads."""
      g, i = which(j, g, i)
      return b, i, k * self.spec.group + g

    return pl.BlockSpec((1, self.queries.resident, width), at)

  def _row(self, which: Which) -> pl.BlockSpec:
    """Numbers for each row, [B, N, 1, T]."""

    def at(b: Any, k: Any, j: Any, g: Any, i: Any, *_: Any) -> Any:
      """The block that a step of the grid reads."""
      g, i = which(j, g, i)
      return b, k * self.spec.group + g, 0, i

    return pl.BlockSpec((1, 1, 1, self.queries.resident), at)

  def _of_keys(self, width: int) -> pl.BlockSpec:
    """Packed arrays [B, S, K H]."""

    def at(b: Any, k: Any, j: Any, g: Any, i: Any, *_: Any) -> Any:
      """The block that a step of the grid reads."""
      return b, self._part_of_keys(j), k

    return pl.BlockSpec((1, self.part, width), at)
