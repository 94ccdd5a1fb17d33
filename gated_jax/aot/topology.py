"""Topologies of devices that are not there, to compile for."""

import os
from typing import Any

from jax.experimental import topologies

from gated_jax import chips

# libtpu reads these when it is loaded. Without them it asks the cloud's
# metadata server which machine it is on, logs at length that there is none, and
# refuses to be loaded by two processes at a time.
QUIET = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def open_topology(name: str, slices: int = 1) -> list[Any]:
  """The devices of a pod, for compilation only.

  Args:
    name: kind and chips along each direction: v5e:16x16, v5p:8x8x8.
    slices: number of pods of that shape, joined by the slow network.

  Raises:
    ValueError: the compiler does not know it, or is not installed.
  """
  for key, value in QUIET.items():
    os.environ.setdefault(key, value)
  more = {'num_slices': slices} if slices > 1 else {}
  try:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **more
    )
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'topology={name!r} is not one the TPU compiler knows (like v5e:16x16, '
      f'v6e:16x16 or v5p:8x8x8; it needs libtpu): {reason}'
    ) from None
  devices = list(topology.devices)
  chip_of(devices)  # refuses what the table lacks
  return devices


def chip_of(devices: list[Any]) -> chips.Tpu:
  """The table's row for these devices.

  Raises:
    ValueError: the table has none.
  """
  kind = devices[0].device_kind
  chip = chips.find_tpu(kind)
  if chip is None:
    known = ', '.join(row.kinds[0] for row in chips.TPUS.values())
    raise ValueError(f'{kind!r} is not in the table of TPUs: {known}')
  return chip.with_cores(getattr(devices[0], 'num_cores', chip.cores))
