"""What each TPU can do, and the devices of a pod that nobody had to rent.

Figures are per JAX device as the compiler sees it. That is a chip, except on
v4, where it is one of a chip's two cores.
"""

import dataclasses
import os
from typing import Any

from jax.experimental import topologies

from gated_jax.ops.attention.schedule import QUIET

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Clocks follow from the published peak and the width of the matrix units:
  v5e has 4 of 128 x 128, 131,072 FLOPs per cycle, and 197 TFLOP/s.
  """

  name: str
  hbm: float  # bytes that the compiler lets a program use
  clock: float  # cycles per second
  flops_per_cycle: int  # bfloat16, on the matrix units
  link: float  # bytes per second, one link, one direction
  wraps: int  # a slice this long closes to a ring in that direction
  network: float  # bytes per second to another slice

  @property
  def peak(self) -> float:
    """FLOPs per second."""
    return self.clock * self.flops_per_cycle


# Memory: the compiler's own message when a program is too large ("exceeds
# available HBM"), libtpu 0.0.42.1. Peaks, links and networks:
# cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (system architecture).
# They give the bandwidth of all links of a chip, both directions together:
# v5e 400 GB/s over 4, v5p 1200 over 6, v6e 800 over 4; v4 600 over 6, of
# which a core is given half. Rings close on v5e and v6e at 16, on the cubes
# of v4 and v5p at 4.
CHIPS = {
  'TPU v4': Chip(
    'v4', 15.25 * GIB, 1.05e9, 131_072, 25e9, wraps=4, network=3.125e9
  ),
  'TPU v5 lite': Chip(
    'v5e', 15.75 * GIB, 1.5e9, 131_072, 50e9, wraps=16, network=3.125e9
  ),
  'TPU v5': Chip(
    'v5p', 95.74 * GIB, 1.75e9, 262_144, 100e9, wraps=4, network=6.25e9
  ),
  'TPU v6 lite': Chip(
    'v6e', 31.25 * GIB, 1.75e9, 524_288, 100e9, wraps=16, network=12.5e9
  ),
}


def open_topology(name: str, slices: int = 1) -> list[Any]:
  """The devices of a pod, for compilation only.

  Args:
    name: kind and chips along each direction: v5e:16x16, v5p:8x8x8.
    slices: pods of that shape, joined by the slow network.

  Raises:
    ValueError: the compiler does not know it, or is not installed.
  """
  for key, value in QUIET.items():
    os.environ.setdefault(key, value)
  more = {'num_slices': slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **more
    )
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'topology={name!r} is not one the TPU compiler knows (like v5e:16x16, '
      f'v6e:16x16 or v5p:8x8x8; it needs libtpu): {reason}'
    ) from None
  devices = list(found.devices)
  chip_of(devices)  # refuses what the table lacks
  return devices


def chip_of(devices: list[Any]) -> Chip:
  """The kind of chip that devices are."""
  kind = devices[0].device_kind
  if kind not in CHIPS:
    raise ValueError(f'{kind!r} is not in the table of chips: {list(CHIPS)}')
  return CHIPS[kind]
