"""One layer of a stack that nobody has read yet."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from gated_jax.ops.layout import pin_row_major


@dataclasses.dataclass(frozen=True)
class Slice:
  """`stack[layer]`, seen in another shape, then with its axes in an order.

  Kept as such, a kernel can read it where it lies. Anything else reads it by
  `read`, as the scan itself would have done, but row by row.
  """

  stack: Array  # [L, ...]
  shape: tuple[int, ...]
  order: tuple[int, ...]
  # What makes of the array as it lies the array as it is seen.
  steps: tuple[Callable[[Array], Array], ...] = ()
  # How the array as it lies is split, where that is known.
  place: NamedSharding | None = None

  @classmethod
  def of(
    cls,
    stack: Array,
    shape: tuple[int, ...] | None = None,
    place: NamedSharding | None = None,
  ) -> 'Slice':
    """A layer as it lies, or in another shape."""
    lying = stack.shape[1:]
    plain = cls(stack, lying, tuple(range(len(lying))), place=place)
    return plain if shape in (None, lying) else plain.reshaped(shape)

  @property
  def in_order(self) -> bool:
    """Whether the axes are in the order in which they lie."""
    return self.order == tuple(range(len(self.order)))

  @property
  def as_it_lies(self) -> bool:
    """Whether a kernel can read it in place."""
    return self.in_order and self.shape == self.stack.shape[1:]

  def read(self, layer: Array) -> Array:
    """The array."""
    x = jax.lax.dynamic_index_in_dim(self.stack, layer, keepdims=False)
    if self.place is not None:
      x = _row_major(x, self.place)
    return functools.reduce(lambda x, step: step(x), self.steps, x)

  def then(self, step: Callable[[Array], Array]) -> 'Slice':
    """The same after a step that changes no number and no shape."""
    return dataclasses.replace(self, steps=(*self.steps, step))

  def reshaped(self, shape: tuple[int, ...]) -> 'Slice':
    """The same, whose axes are in order, in another shape."""
    order = tuple(range(len(shape)))
    seen = dataclasses.replace(self, shape=shape, order=order)
    return seen.then(lambda x: x.reshape(shape))

  def transposed(self, axes: tuple[int, ...]) -> 'Slice':
    """The same with its axes in another order."""
    order = tuple(self.order[axis] for axis in axes)
    seen = dataclasses.replace(self, order=order)
    return seen.then(lambda x: x.transpose(axes))

  def split(self, axes: tuple) -> tuple | None:
    """Mesh axes of the stack, from those of the array as it is seen.

    The last axis of the stack may be seen as two, heads and their channels.

    Returns:
      None where the array has to be read to be split in that way.
    """
    axes = (*axes, *[None] * (len(self.shape) - len(axes)))
    lying = self.stack.shape[1:]
    if not self.in_order:
      return None
    if self.shape == lying:
      return (None, *axes)
    heads = self.shape[:-2] == lying[:-1] and len(self.shape) > 1
    return (None, *axes[:-1]) if heads and axes[-1] is None else None


def _row_major(x: Array, place: NamedSharding) -> Array:
  """An array that lies row by row on each device.

  XLA:TPU may want what is made of it with another axis innermost, as products
  do that sum over positions. It would turn the whole stack in each layer, since
  kernels want the stack row by row.
  """
  spec = place.spec
  return jax.shard_map(
    pin_row_major,
    mesh=place.mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )(x)
