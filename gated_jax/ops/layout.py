"""How an array lies in the memory of a TPU."""

import jax
from jax.experimental.layout import Layout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array


def pin_row_major(x: Array) -> Array:
  """The same array, row by row where this runs on a TPU; elsewhere nothing.

  Of one device's shard: XLA's partitioner gathers what lies under a layout
  constraint.
  """
  order = Layout(tuple(range(x.ndim)))
  return jax.lax.platform_dependent(
    x,
    tpu=lambda x: with_layout_constraint(x, order),
    default=lambda x: x,
  )
