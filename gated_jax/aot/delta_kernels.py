"""Cycles of the gated delta rule's kernels, by their schedules.

A figure is that of one token and value head on a device, whose cores share the
key heads. Waiting for memory is not in it.
"""

import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gated_jax import chips
from gated_jax.aot import counts
from gated_jax.aot import schedule
from gated_jax.aot.attention_kernels import compiling_for
from gated_jax.aot.attention_kernels import device_of
from gated_jax.chips import LANES
from gated_jax.config import RunConfig
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs

# The pass that a kernel belongs to.
PASSES = {'gated_delta_forward': 0, 'gated_delta_backward': 1}


class Sizes(NamedTuple):
  """Heads of a device, and their channels."""

  key_heads: int
  value_heads: int
  width: int
  channels: int

  @classmethod
  def of(cls, config: RunConfig, tensor: int) -> 'Sizes | None':
    """Those of a run's layers; None: it has none that kernels compute."""
    model, sizes = config.model, config.model.delta
    linear = any(x.mixer == 'gated_deltanet' for x in model.distinct_layers)
    whole = not (sizes.key_dim % LANES or sizes.value_dim % LANES)
    if not (linear and whole) or sizes.implementation == 'chunks':
      return None
    # A sequence that is split over devices has columns of two kinds; see
    # `gated_jax/ops/delta/context.py`.
    split = config.mesh.context > 1
    return cls(
      max(1, sizes.key_heads // tensor),
      max(1, sizes.value_heads // tensor),
      sizes.key_dim,
      sizes.value_dim + split * sizes.key_dim,
    )


def estimate(
  kind: str, sizes: Sizes, length: int, folder: pathlib.Path
) -> list[float]:
  """Cycles of one token and value head, forward and backward.

  Args:
    kind: name of a TPU.
    sizes: of the heads.
    length: tokens of a row.
    folder: where libtpu writes schedules.
  """
  chip, device = chips.TPUS[kind], device_of(kind)
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """An array of a row's tokens that is not there."""
    return jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=place)

  def run(inputs: Inputs, slope: jax.Array) -> Inputs:
    """Gradients of all inputs."""

    def output(inputs: Inputs) -> jax.Array:
      """The rule from a state of zeros."""
      return rule.delta_rule(inputs, None, None, 'pallas_tpu').output

    return jax.vjp(output, inputs)[1](slope)[0]

  keys = array(sizes.key_heads, sizes.width)
  values = (sizes.value_heads, sizes.channels)
  rates = array(sizes.value_heads, dtype=jnp.float32)
  inputs = Inputs(keys, keys, array(*values), rates, rates)
  arguments = inputs, array(*values, dtype=jnp.float32)
  before = set(folder.iterdir())
  with compiling_for(device):
    jax.jit(run).lower(*arguments).compile()
  cycles = [0.0, 0.0]
  for kernel in counts.kernels(run, *arguments):
    (path,) = (p for p in schedule.find(folder, kernel.name) if p not in before)
    stretches = schedule.read(path, chip.core)
    total = schedule.estimate(stretches, kernel, chip.core).cycles
    heads = length * sizes.value_heads * chip.cores
    cycles[PASSES[kernel.name]] = total / heads
  return cycles
