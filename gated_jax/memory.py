"""The memory of this machine: what cannot fit is refused at once.

Making the arrays would show it too: after minutes, and by the system ending
the process without a word.
"""

import ctypes
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

GIB = 1 << 30
_MMAP_THRESHOLD = -3  # the parameter's number in glibc's malloc.h
_LARGE = 1 << 16  # bytes of a block that the system takes back
# Limits that a container sets, for both versions of control groups.
_CONTAINER = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


def size_of(tree: Any) -> int:
  """Bytes of arrays, or of their abstract forms."""
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def of_host() -> int:
  """Bytes that this machine has, swap included; 0: not known."""
  try:
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (ValueError, OSError):
    return 0
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    fields = dict(line.split(':', 1) for line in lines)
    total += 1024 * int(fields['SwapTotal'].split()[0])
  except (OSError, KeyError, ValueError):
    pass
  for path in _CONTAINER:
    try:
      total = min(total, int(pathlib.Path(path).read_text()))
    except (OSError, ValueError):  # absent, or 'max'
      continue
  return total


def of_devices(devices: Sequence[jax.Device]) -> int:
  """Bytes that devices have together; 0: not known.

  CPU devices of one process share its machine. The machines of other processes
  are taken to be like this one.
  """
  if devices[0].platform == 'cpu':
    return of_host() * len({device.process_index for device in devices})
  local = [device for device in devices if device in jax.local_devices()]
  stats = [device.memory_stats() or {} for device in local]
  limits = [int(each.get('bytes_limit', 0)) for each in stats]
  if not limits or 0 in limits:
    return 0
  return sum(limits) * len(devices) // len(limits)


def check(what: str, needed: int, devices: Sequence[jax.Device]) -> None:
  """ValueError where something needs more memory than devices have.

  Args:
    what: Names it, with the settings that decide its size.
    needed: Bytes.
    devices: The ones that hold it.
  """
  there = of_devices(devices)
  if there and needed > there:
    raise ValueError(
      f'{what} need {needed / GIB:,.1f} GiB of memory, and '
      f'{len(devices)} x {devices[0].device_kind} have {there / GIB:,.1f} GiB'
    )


def give_back_freed() -> None:
  """Has the C library return large blocks to the system when they are freed.

  TensorStore encodes arrays in threads, and glibc keeps what each of them freed
  in a pool of its own: the arrays of a checkpoint add up there as they are
  written. Other C libraries are left as they are.
  """
  try:
    library = ctypes.CDLL(None)
  except (OSError, TypeError):
    return
  mallopt = getattr(library, 'mallopt', None)
  if mallopt is not None:
    mallopt(_MMAP_THRESHOLD, _LARGE)
