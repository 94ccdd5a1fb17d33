"""aot/topology.py: where the two devices of a chip lie on a mesh."""

import pytest

from gated_jax.aot.topology import open_topology
from gated_jax.aot.topology import parted_chips
from gated_jax.config import MeshConfig

pytest.importorskip('libtpu')


@pytest.mark.parametrize(
  ('mesh', 'expected'),
  [
    (MeshConfig(), ''),
    (MeshConfig(tensor=2), ''),
    (MeshConfig(expert=8), ''),
    (
      MeshConfig(tensor=4),
      'lie along fsdp, not along tensor, where more is said; with '
      'mesh.tensor=2 or mesh.tensor=8 they would',
    ),
    (
      MeshConfig(data=2),
      'lie along data, not along fsdp, where more is said; with mesh.data=1 ',
    ),
  ],
)
def test_a_mesh_that_parts_chips_badly_says_what_is_better(mesh, expected):
  line = parted_chips(mesh, open_topology('tpu7x:4x4x8'))
  assert expected in line
  assert bool(line) == bool(expected)


def test_a_chip_that_is_one_device_is_never_parted():
  assert parted_chips(MeshConfig(data=2), open_topology('v5e:4x4')) == ''
