"""Topologies of devices that are not there, to compile for."""

import dataclasses
import os
from typing import Any

import numpy as np
from jax.experimental import topologies

from gated_jax import chips
from gated_jax import sharding
from gated_jax.config import MeshConfig

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


# Mesh axes by how much is said along them, most first.
_TALKING = ('tensor', 'expert', 'context', 'fsdp', 'data')


def chip_axis(mesh: Any) -> str:
  """The mesh axis along which the devices of a chip lie; '': it is one."""
  first = mesh.devices.flat[0]
  for place in np.ndindex(mesh.devices.shape):
    device = mesh.devices[place]
    if any(place) and device.coords == first.coords:
      return next(
        name for name, at in zip(mesh.axis_names, place, strict=True) if at
      )
  return ''


def parted_chips(config: MeshConfig, devices: list[Any]) -> str:
  """A line where a mesh parts a chip's devices badly; '' where it does not.

  They talk past the links of the torus, so they belong on the axis that talks
  most.

  Args:
    config: the mesh.
    devices: of a topology.
  """
  mesh = sharding.make_mesh(config, devices)
  axis = chip_axis(mesh)
  most = next((name for name in _TALKING if mesh.shape[name] > 1), '')
  if not axis or axis == most:
    return ''
  better = []
  for size in (mesh.shape[most] // 2, mesh.shape[most] * 2):
    other = dataclasses.replace(config, **{most: size})
    try:
      if chip_axis(sharding.make_mesh(other, devices)) == most:
        better.append(f'mesh.{most}={size}')
    except (ValueError, NotImplementedError):
      continue
  if mesh.shape['data'] > 1 and axis == 'data':
    better = ['mesh.data=1']
  hint = f'; with {" or ".join(better)} they would' if better else ''
  return (
    f'the two devices of a chip lie along {axis}, not along {most}, where more '
    f'is said{hint}'
  )
