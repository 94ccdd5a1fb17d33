"""Cycles of the kernels of a Gated DeltaNet layer, by their schedules.

A figure of the rule is that of one token and value head on a device, whose
cores share the key heads; waiting for memory is not in it. A figure of what
stands around the rule is that of one token and 128 channels, and as long as
memory takes for its arrays where that is longer. Filters are those of steps
within a document; the few in which one begins take longer.
"""

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gated_jax import chips
from gated_jax.aot import kernel_cycles
from gated_jax.aot.attention_kernels import device_of
from gated_jax.aot.program import Kernel
from gated_jax.chips import LANES
from gated_jax.config import RunConfig
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.filtering import filtered_heads
from gated_jax.ops.delta.gated_norm import gated_norm
from gated_jax.ops.delta.inputs import Inputs

RULE = ('gated_delta_forward', 'gated_delta_backward')
# What stands around it, each with the arrays that it reads and writes.
AROUND = {
  'delta_filter_forward': 2,
  'delta_filter_backward': 3,
  'delta_unit_filter_forward': 2,
  'delta_unit_filter_backward': 3,
  'delta_norm_forward': 3,
  'delta_norm_backward': 5,
}


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
) -> dict[str, float]:
  """Cycles of each kernel, by its name.

  Args:
    kind: name of a TPU.
    sizes: of the heads.
    length: tokens of a row.
    folder: where libtpu writes schedules.
  """
  chip, device = chips.TPUS[kind], device_of(kind)
  arguments = _arguments(sizes, length, device)
  totals = kernel_cycles.of_each(kind, _both_passes, arguments, folder)
  cycles = {}
  for name, total in totals.items():
    total /= length
    if name in RULE:
      cycles[name] = total / sizes.value_heads
      continue
    heads, channels = (
      (sizes.key_heads, sizes.width)
      if 'unit' in name
      else (sizes.value_heads, sizes.channels)
    )
    registers = heads * channels / LANES
    traffic = AROUND[name] * LANES * 2 / chip.bytes_per_cycle
    cycles[name] = max(total / registers, traffic)
  return cycles


def _arguments(sizes: Sizes, length: int, device: Any) -> list[Any]:
  """Arrays of a row's tokens that are not there, for `_both_passes`."""
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """One of them."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  keys = array(1, length, sizes.key_heads, sizes.width)
  values = array(1, length, sizes.value_heads, sizes.channels)
  rates = array(1, length, sizes.value_heads, dtype=jnp.float32)
  taps = 4
  filters = (array(taps, *x.shape[2:]) for x in (keys, values))
  scale = array(sizes.channels, dtype=jnp.float32)
  return [Inputs(keys, keys, values, rates, rates), *filters, scale]


def _both_passes(
  inputs: Inputs, key_filters: Any, value_filters: Any, scale: Any
) -> Any:
  """Every kernel of a layer once, with its gradients."""
  kernels, eps = 'pallas_tpu', 1e-6
  calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    'unit_filter': (
      lambda x, w: filtered_heads(x, w, (None, None), 1.0, kernels),
      (inputs.key, key_filters),
    ),
    'filter': (
      lambda x, w: filtered_heads(x, w, (None, None), 0.0, kernels),
      (inputs.value, value_filters),
    ),
    'rule': (
      lambda x: rule.delta_rule(x, None, None, kernels).output,
      (inputs,),
    ),
    'norm': (
      lambda x, z, s: gated_norm(x, z, s, eps, 'silu', kernels),
      (inputs.value, inputs.value, scale),
    ),
  }
  results = {}
  for name, (call, arrays) in calls.items():
    y, pull = jax.vjp(call, *arrays)
    results[name] = pull(y)
  return results


def price(kernel: Kernel, known: dict[str, float]) -> float | None:
  """Cycles of a call; None: it is none of a layer's kernels, or not known.

  Args:
    kernel: of a compiled program.
    known: what `estimate` gave.
  """
  if kernel.name not in known:
    return None
  # The last axes, as an array may be a stack of layers.
  if kernel.name in RULE:
    # Numbers of each token in rows, which both passes have.
    text = ' '.join(kernel.operands)
    sizes = re.search(r'f32\[(?:\d+,)?(\d+),(\d+),8,(\d+)\]', text)
    share = 1.0
  else:
    sizes = re.search(r'(\d+),(\d+),(\d+)\]', kernel.output)
    share = 1 / LANES
  if not sizes:
    return None
  return math.prod(map(int, sizes.groups())) * share * known[kernel.name]
