"""Where a mesh's devices lie on a TPU's torus.

What an all-to-all can move is bound by the links through the middle of its
group: a line of eight devices has one there, a block of four by two has two, a
cube has four. So the experts' axis gets the block of chips whose longest side
is shortest, and the other axes what is left.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def grid(devices: Sequence[Any]) -> np.ndarray | None:
  """Devices by their place: three directions, then the cores of a chip.

  Args:
    devices: TPUs, in any order.

  Returns:
    The array; None where they do not fill a box.
  """
  places = [
    (*device.coords, getattr(device, 'core_on_chip', 0)) for device in devices
  ]
  first = np.min(places, axis=0)
  sides = np.max(places, axis=0) - first + 1
  if math.prod(sides.tolist()) != len(devices) or len(set(places)) < len(
    places
  ):
    return None
  box = np.empty(sides, dtype=object)
  for device, place in zip(devices, places, strict=True):
    box[tuple(place - first)] = device
  return box


def block(sides: Sequence[int], size: int) -> tuple[int, ...] | None:
  """The sides of the best block of so many devices; None: there is none.

  The cores of one chip, the last side, need no link, so they come first.

  Args:
    sides: of the whole box.
    size: devices of the block; blocks of its sides must fill the box.
  """
  candidates = [
    sides
    for sides in itertools.product(*(_divisors(side) for side in sides))
    if math.prod(sides) == size
  ]
  if not candidates:
    return None
  return min(candidates, key=lambda b: (max(b[:-1]), -b[-1], b))


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def in_blocks(devices: Sequence[Any], size: int) -> np.ndarray | None:
  """Devices as [blocks, size], each block compact on the torus.

  Args:
    devices: TPUs.
    size: devices of a block.

  Returns:
    The array; None where the torus is not a box of such blocks.
  """
  box = grid(devices)
  sides = None if box is None else block(box.shape, size)
  if box is None or sides is None:
    return None
  split = [
    n
    for whole, part in zip(box.shape, sides, strict=True)
    for n in (whole // part, part)
  ]
  directions = range(len(sides))
  order = [*(2 * i for i in directions), *(2 * i + 1 for i in directions)]
  return box.reshape(split).transpose(order).reshape(-1, size)
