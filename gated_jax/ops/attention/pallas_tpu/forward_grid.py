"""The grid of the forward kernel: which block of each array a step has.

A step is (b, n, i, j): row, head, block of queries, and part of the keys,
counted from the last part that the block sees.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.blocks import resident_part


class Grid:
  """Resident parts of the keys, and the block specs of all arrays."""

  def __init__(self, spec: KernelSpec):
    self.spec = spec
    self.part = resident_part(spec.keys, spec.blocks.keys, spec.blocks.resident)
    self.parts = spec.keys // self.part
    blocks = range(spec.queries // spec.blocks.queries)
    # The most parts that any block of queries sees.
    self.steps = max(self.last(i) - self.first(i) + 1 for i in blocks)

  def first(self, i: Any) -> Any:
    """The first part that block i of queries sees."""
    rule, rows = self.spec.rule, self.spec.blocks.queries
    if not rule.window:
      return 0 * i
    return masks.part_of(i * rows - rule.window + 1, self.part, self.parts)

  def last(self, i: Any) -> Any:
    """The last part that block i of queries sees."""
    rows = self.spec.blocks.queries
    if not self.spec.rule.causal:
      return 0 * i + self.parts - 1
    return masks.part_of(i * rows + rows - 1, self.part, self.parts)

  def at(self, i: Any, j: Any) -> Array:
    """The part that is fetched for step j of block i."""
    return jnp.maximum(self.last(i) - j, self.first(i))

  def block_specs(self) -> dict[str, pl.BlockSpec]:
    """The block of each array that a step has in VMEM."""
    spec, rows = self.spec, self.spec.blocks.queries

    def of_queries(width: int) -> pl.BlockSpec:
      """A block of an array that queries index."""
      return pl.BlockSpec((1, rows, width), lambda b, n, i, j, *_: (b, i, n))

    def of_keys(width: int) -> pl.BlockSpec:
      """A block of an array that keys index, by key head."""
      return pl.BlockSpec(
        (1, self.part, width),
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
        (1, 1, self.part), lambda b, n, i, j, *_: (b, 0, self.at(i, j))
      ),
      'output': of_queries(spec.value_dim),
      'lse': row,
    }
