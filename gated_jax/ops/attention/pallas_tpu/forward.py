"""Forward of gated flash attention in one TPU kernel.

A block of queries stays in VMEM and walks over the keys that it sees, with a
running maximum and sums. A resident part of keys and values is one step of the
grid; the part with the diagonal comes first. The last step divides by the sum
of the weights, multiplies by the gate, and writes the output.

`forward_step.py` has the kernel, `forward_grid.py` the blocks of its arrays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.attention.pallas_tpu import forward_step
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.pallas_tpu.forward_grid import Grid


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
  blocks, grid = spec.blocks, Grid(spec)
  tables: dict[str, Array] = {}
  inputs = dict(arrays)
  scratch = _scratch(spec)
  if segments is not None:
    tables = {
      'query_spans': masks.segment_spans(segments[0], blocks.queries),
      'key_spans': masks.segment_spans(segments[1], blocks.keys),
    }
    inputs |= {'query_ids': segments[0], 'key_ids': segments[1]}
    scratch['id_columns'] = pltpu.VMEM((blocks.queries, LANES), jnp.int32)
  outputs = _outputs(spec, inputs['query'])
  specs = grid.block_specs()
  every_array = [*inputs.values(), *outputs.values()]
  kernel = functools.partial(
    forward_step.kernel,
    names=(*tables, *inputs, *outputs, *scratch),
    spec=spec,
    grid=grid,
  )
  output, lse = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=(
        inputs['query'].shape[0],
        spec.heads,
        spec.queries // blocks.queries,
        grid.steps,
      ),
      in_specs=[specs[name] for name in inputs],
      out_specs=[specs[name] for name in outputs],
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=list(outputs.values()),
    cost_estimate=spec.cost((1, 1), range(spec.queries), every_array),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 3 + ('arbitrary',),
      vmem_limit_bytes=blocks.vmem_mib << 20,
    ),
    interpret=spec.interpret,
    name='gated_attention_forward',
  )(*tables.values(), *inputs.values())
  return output, lse


def _scratch(spec: KernelSpec) -> dict[str, Any]:
  """Arrays that stay in VMEM from step to step, in order."""
  rows = spec.blocks.queries
  return {
    'maximum': pltpu.VMEM((rows, LANES), jnp.float32),
    'total': pltpu.VMEM((rows, LANES), jnp.float32),
    'sums': pltpu.VMEM((rows, spec.value_dim), jnp.float32),
  }


def _outputs(spec: KernelSpec, query: Array) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays that the kernel writes, in order."""
  batch = query.shape[0]
  return {
    'output': jax.ShapeDtypeStruct(
      (batch, spec.queries, spec.heads * spec.value_dim), query.dtype
    ),
    'lse': jax.ShapeDtypeStruct(
      (batch, spec.heads, 1, spec.queries), jnp.float32
    ),
  }
