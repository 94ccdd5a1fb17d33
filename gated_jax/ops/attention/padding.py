"""How lengths are padded for kernels that work on whole blocks."""

from gated_jax.chips import LANES

LARGEST = 1024


def padding_block(length: int) -> int:
  """The largest power of two up to 1024 that pads by at most an eighth.

  It is at least 128, even where that pads a short length by more.
  """
  block = LARGEST
  while block > LANES and (-length % block) * 8 > length:
    block //= 2
  return block


def padded(length: int) -> int:
  """The length, rounded up to a multiple of its block."""
  return round_up(length, padding_block(length))


def round_up(x: int, unit: int) -> int:
  """The next multiple of `unit`."""
  return x + -x % unit
