"""Blocks of devices on a torus: their sides, and who is in them."""

import dataclasses
import itertools

import numpy as np
import pytest

from gated_jax import sharding
from gated_jax import torus
from gated_jax.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Device:
  """A TPU that knows its place."""

  coords: tuple[int, int, int]
  core_on_chip: int = 0
  platform: str = 'tpu'
  slice_index: int | None = None


def pod(*sides, cores=1, start=0):
  places = itertools.product(*(range(start, start + n) for n in sides))
  return [Device(place, core) for place in places for core in range(cores)]


@pytest.mark.parametrize(
  ('sides', 'size', 'expected'),
  [
    ((4, 8, 8, 1), 8, (2, 2, 2, 1)),
    ((16, 16, 1, 1), 4, (2, 2, 1, 1)),
    ((16, 16, 1, 1), 8, (2, 4, 1, 1)),
    ((16, 16, 1, 1), 16, (4, 4, 1, 1)),
    ((2, 16, 1, 1), 16, (2, 8, 1, 1)),
    ((4, 4, 8, 2), 8, (1, 2, 2, 2)),
    ((4, 4, 8, 2), 2, (1, 1, 1, 2)),
    ((4, 4, 4, 1), 3, None),
  ],
)
def test_a_block_is_as_short_as_it_can_be(sides, size, expected):
  assert torus.block(sides, size) == expected


@pytest.mark.parametrize(('start', 'cores'), [(0, 1), (4, 2)])
def test_blocks_are_compact_and_have_every_device_once(start, cores):
  devices = pod(4, 4, 8, cores=cores, start=start)
  blocks = torus.in_blocks(devices[::-1], 8)
  assert blocks.shape == (len(devices) // 8, 8)
  assert set(blocks.ravel()) == set(devices)
  for block in blocks:
    places = np.array([(*d.coords, d.core_on_chip) for d in block])
    assert np.prod(np.ptp(places, axis=0) + 1) == 8
    assert np.ptp(places, axis=0).max() == 1


def test_devices_that_fill_no_box_have_no_blocks():
  assert torus.in_blocks(pod(4, 4, 4)[1:], 8) is None
  assert torus.in_blocks(pod(4, 4, 4), 5) is None


def test_experts_get_blocks_and_rows_what_is_left():
  made = sharding.make_mesh(MeshConfig(data=2, expert=4), pod(16, 16, 1))
  assert dict(made.shape)['fsdp'] == 32
  for block in made.devices.reshape(-1, 4):
    assert np.ptp([d.coords for d in block], axis=0).tolist() == [1, 1, 0]
