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
for each resident part, which is less work than keeping dY.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from gated_jax.chips import LANES
from gated_jax.ops.attention.pallas_tpu import backward_step
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu.backward_grid import Grid
from gated_jax.ops.attention.pallas_tpu.backward_grid import QueryRange
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.blocks import resident_part

Segments = tuple[Array, Array] | None


def backward(
  spec: KernelSpec, arrays: dict[str, Array], segments: Segments
) -> dict[str, Array]:
  """Packed gradients: d_query, d_key, d_value and, with a gate, d_gate_logits.

  Args:
    spec: what the kernel is compiled for.
    arrays: key, value, query, d_gated, saved, gate_logits where there are any,
      and lse and d_lse as [B, N, 1, T'].
    segments: document numbers [B, 1, T'] and [B, 1, S'], or None.
  """
  blocks = spec.blocks
  fitting = int(blocks.dq_mib * 2**20) // (4 * spec.group * spec.head_dim)
  resident = resident_part(
    spec.queries, blocks.back_queries, min(blocks.back_resident, fitting)
  )
  count = resident_part(spec.queries, resident, fitting)
  ranges = [
    _gradients(spec, arrays, segments, QueryRange(start, count, resident))
    for start in range(0, spec.queries, count)
  ]
  if len(ranges) == 1:
    return ranges[0]
  gradients = {
    'd_query': jnp.concatenate([d['d_query'] for d in ranges], axis=1),
    'd_key': _add([d['d_key'] for d in ranges], arrays['key']),
    'd_value': _add([d['d_value'] for d in ranges], arrays['value']),
  }
  if spec.granularity != 'none':
    axis = -1 if spec.granularity == 'headwise' else 1
    gradients['d_gate_logits'] = jnp.concatenate(
      [d['d_gate_logits'] for d in ranges], axis=axis
    )
  return gradients


def _add(ranges: list[Array], like: Array) -> Array:
  """The sum of gradients of keys; early queries see only the first of them."""
  total = ranges[-1]
  for part in ranges[:-1]:
    total = total.at[:, : part.shape[1]].add(part)
  rest = like.shape[1] - total.shape[1]
  return jnp.pad(total, ((0, 0), (0, rest), (0, 0))).astype(like.dtype)


def _gradients(
  spec: KernelSpec,
  arrays: dict[str, Array],
  segments: Segments,
  queries: QueryRange,
) -> dict[str, Array]:
  """All gradients that the queries of a range contribute to."""
  grid = Grid(spec, queries)
  tables: dict[str, Array] = {}
  inputs = dict(arrays)
  scratch = _scratch(spec, grid, inputs['query'].dtype)
  if segments is not None:
    blocks = spec.blocks
    tables = {
      'query_spans': masks.segment_spans(segments[0], blocks.back_queries),
      'key_spans': masks.segment_spans(segments[1], blocks.back_keys),
    }
    inputs |= {'query_ids': segments[0], 'key_ids': segments[1]}
    scratch['id_columns'] = pltpu.VMEM((grid.part, LANES), jnp.int32)
  outputs = _outputs(spec, grid, arrays)
  in_specs, out_specs = grid.in_specs(), grid.out_specs()
  kernel = functools.partial(
    backward_step.kernel,
    names=(*tables, *inputs, *outputs, *scratch),
    spec=spec,
    grid=grid,
  )
  pairs = range(queries.start, queries.start + queries.count)
  vmem = spec.blocks.vmem_mib << 20
  gradients = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(
        inputs['query'].shape[0],
        spec.kv_heads,
        grid.parts,
        spec.group,
        queries.parts,
      ),
      in_specs=[in_specs[name] for name in inputs],
      out_specs=[out_specs[name] for name in outputs],
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=list(outputs.values()),
    cost_estimate=spec.cost(
      (3, 2), pairs, [*inputs.values(), *outputs.values()]
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 2 + ('arbitrary',) * 3,
      vmem_limit_bytes=vmem + 4 * math.prod(scratch['sum_query'].shape),
    ),
    interpret=spec.interpret,
    name='gated_attention_backward',
  )(*tables.values(), *inputs.values())
  return dict(zip(outputs, gradients, strict=True))


def _scratch(spec: KernelSpec, grid: Grid, dtype: jnp.dtype) -> dict[str, Any]:
  """Arrays that stay in VMEM from step to step, in order."""
  rows = grid.queries.resident
  slots = spec.group * grid.queries.parts
  return {
    'sum_key': pltpu.VMEM((grid.part, spec.head_dim), jnp.float32),
    'sum_value': pltpu.VMEM((grid.part, spec.value_dim), jnp.float32),
    'sum_query': pltpu.VMEM((slots, rows, spec.head_dim), jnp.float32),
    'd_output': pltpu.VMEM((rows, spec.value_dim), dtype),
    'delta': pltpu.VMEM((1, rows), jnp.float32),
    'log2_total': pltpu.VMEM((1, rows), jnp.float32),
  }


def _outputs(
  spec: KernelSpec, grid: Grid, arrays: dict[str, Array]
) -> dict[str, jax.ShapeDtypeStruct]:
  """The gradients that the call writes, in order."""
  key, value, query = (arrays[name] for name in ('key', 'value', 'query'))
  batch, count = query.shape[0], grid.queries.count
  # Sums over ranges of queries are rounded once, at the end.
  dtype = key.dtype if count == spec.queries else jnp.float32
  keys = grid.parts * grid.part
  outputs = {
    'd_key': jax.ShapeDtypeStruct((batch, keys, key.shape[2]), dtype),
    'd_value': jax.ShapeDtypeStruct((batch, keys, value.shape[2]), dtype),
    'd_query': jax.ShapeDtypeStruct(
      (batch, count, query.shape[2]), query.dtype
    ),
  }
  if spec.granularity != 'none':
    gate_logits = arrays['gate_logits']
    headwise = spec.granularity == 'headwise'
    outputs['d_gate_logits'] = jax.ShapeDtypeStruct(
      (batch, spec.heads, 1, count)
      if headwise
      else (batch, count, spec.heads * spec.value_dim),
      gate_logits.dtype,
    )
  return outputs
