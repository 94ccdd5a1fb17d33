"""Lengths are padded little, to blocks that are large."""

import pytest

from gated_jax.ops.attention.padding import padded
from gated_jax.ops.attention.padding import padding_block


@pytest.mark.parametrize(
  'length, block',
  [
    (1, 128),
    (128, 128),
    (129, 128),
    (1000, 1024),
    (1024, 1024),
    (1100, 128),
    (1664, 256),
    (1700, 256),
    (4096, 1024),
    (4097, 1024 // 2),
    (131_072, 1024),
  ],
)
def test_blocks_are_as_large_as_little_padding_allows(length, block):
  assert padding_block(length) == block
  assert padded(length) - length == -length % block <= max(length / 8, 127)
