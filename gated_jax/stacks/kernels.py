"""A Pallas kernel once more, with stacks in place of some of its arrays.

Such a kernel gets the number of the layer as a scalar, and the blocks of a
stack have one more axis, at whose place that number stands. What the kernel
itself sees is as before.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from jaxtyping import Array

from gated_jax.stacks.slices import Slice

NAME = 'pallas_call'


def _mapping(eqn: Any) -> Any:
  return eqn.params['grid_mapping']


def _offset(eqn: Any) -> int:
  """Operands before the arrays: bounds of the grid, and tables."""
  mapping = _mapping(eqn)
  return mapping.num_dynamic_grid_bounds + mapping.num_index_operands


def _in_blocks(block: Any) -> bool:
  """Whether the kernel is handed an array block by block."""
  space = str(block.transformed_block_aval.memory_space)
  return space in ('None', 'default', 'vmem') and not block.transforms


def can_read(eqn: Any, operand: int) -> bool:
  """Whether this operand of the kernel may be a stack."""
  bounds = _mapping(eqn).num_dynamic_grid_bounds
  aliases = dict(eqn.params['input_output_aliases'])
  at = operand - _offset(eqn)
  return (
    at >= 0
    and operand - bounds not in aliases
    and _in_blocks(_mapping(eqn).block_mappings[at])
  )


def can_write(eqn: Any, output: int) -> bool:
  """Whether this output of the kernel may be a stack."""
  mapping = _mapping(eqn)
  aliased = [out for _, out in eqn.params['input_output_aliases']]
  block = mapping.block_mappings[mapping.num_inputs + output]
  return output not in aliased and _in_blocks(block)


def _evaluate(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)


def _spec(block: Any, grid: int, stacked: bool) -> pl.BlockSpec:
  """The blocks of one array; the layer's number is the first table."""
  closed = block.index_map_jaxpr

  def index(*args: Any) -> tuple[Any, ...]:
    """Which block a step of the grid takes."""
    steps, (layer, *tables) = args[:grid], args[grid:]
    at = _evaluate(closed.jaxpr, closed.consts, *steps, *tables)
    return (layer[0], *at) if stacked else tuple(at)

  shape = block.block_shape
  return pl.BlockSpec(
    (None, *shape) if stacked else shape,
    index,
    memory_space=block.transformed_block_aval.memory_space,
    pipeline_mode=block.pipeline_mode,
  )


def call(
  eqn: Any,
  layer: Array,
  operands: Sequence[Any],
  stacks: dict[int, Array],
) -> list[Array]:
  """Runs the kernel of an equation.

  Args:
    eqn: of `pallas_call`.
    layer: the number of the layer, int32 [].
    operands: arrays, and slices where `can_read` says that it may be one.
    stacks: by the number of an output for which `can_write` says so, the stack
      into which it is written; others are arrays of their own.

  Returns:
    The outputs; in place of those that are written into stacks, the stacks.
  """
  mapping, params = _mapping(eqn), eqn.params
  bounds, tables = mapping.num_dynamic_grid_bounds, mapping.num_index_operands
  dynamic = iter(operands[:bounds])
  grid = tuple(n if isinstance(n, int) else next(dynamic) for n in mapping.grid)
  arrays = operands[bounds + tables :]
  blocks = mapping.block_mappings
  inputs, outputs = blocks[: mapping.num_inputs], blocks[mapping.num_inputs :]
  in_specs = [
    _spec(block, len(grid), isinstance(x, Slice))
    for block, x in zip(inputs, arrays, strict=True)
  ]
  in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(stacks)
  out_specs = [
    _spec(block, len(grid), i in stacks) for i, block in enumerate(outputs)
  ]
  shapes = [v.aval for v in eqn.outvars]
  # With the layer's number, which comes first.
  aliases = {i + 1: out for i, out in params['input_output_aliases']}
  first = 1 + tables + len(inputs)
  aliases |= {first + i: out for i, out in enumerate(stacks)}
  given = [x.stack if isinstance(x, Slice) else x for x in arrays]
  body = params['jaxpr']

  def kernel(*refs: Any) -> None:
    """The kernel itself, which is shown nothing new."""
    _, *seen = refs
    end = tables + len(inputs)
    _evaluate(body, (), *seen[:end], *seen[end + len(stacks) :])

  with jax.enable_x64(False):  # a kernel's integers have 32 bits
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + tables,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
          aval.memory_space(aval.shape, aval.dtype)
          for aval in mapping.scratch_avals
        ],
      ),
      out_shape=[
        jax.ShapeDtypeStruct(
          stacks[i].shape if i in stacks else aval.shape, aval.dtype
        )
        for i, aval in enumerate(shapes)
      ],
      input_output_aliases=aliases,
      compiler_params=params['compiler_params'],
      cost_estimate=params['cost_estimate'],
      interpret=params['interpret'],
      name=params['name'],
      metadata=params['metadata'],
    )(
      layer.astype(jnp.int32).reshape(1),
      *operands[bounds : bounds + tables],
      *given,
      *stacks.values(),
    )
