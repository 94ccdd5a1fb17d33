"""Rows of the blocks that a TPU kernel takes one after another."""

SMALLEST = 16  # rows of bfloat16 that lie in one tile


def rows_of_block(rows: int, most: int) -> int:
  """A power of two that divides the rows, and no more than a limit.

  Args:
    rows: of the whole array.
    most: the limit, SMALLEST if it is below that.
  """
  limit = 1 << max(most, SMALLEST).bit_length() - 1
  return min(rows & -rows, limit)
