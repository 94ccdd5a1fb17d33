"""Sizes of a step of the grid, and where each head and chunk lies in it."""

from typing import NamedTuple

from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES

# Chunks of a step of the grid.
CHUNKS = 1


class Spec(NamedTuple):
  """Sizes of a step: key heads, value heads of each, and their channels."""

  keys: int
  repeats: int
  width: int
  channels: int

  @property
  def heads(self) -> range:
    """The value heads."""
    return range(self.keys * self.repeats)

  def tokens(self, chunk: int) -> slice:
    """The rows of a chunk."""
    return slice(chunk * CHUNK, (chunk + 1) * CHUNK)

  def key(self, head: int) -> slice:
    """The channels of the key head that serves a value head."""
    at = head // self.repeats * self.width
    return slice(at, at + self.width)

  def value(self, head: int) -> slice:
    """The channels of a value head."""
    return slice(head * self.channels, (head + 1) * self.channels)

  def state(self, chunk: int) -> slice:
    """The rows of the state that a chunk starts from."""
    return slice(chunk * self.width, (chunk + 1) * self.width)

  def numbers(self, head: int) -> slice:
    """The columns that hold a value head's numbers of each token."""
    return slice(head * SUBLANES, (head + 1) * SUBLANES)
