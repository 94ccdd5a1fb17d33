"""Which stacks of a scan its layers write themselves."""

from typing import Any

import jax
from jax.extend import core
from jaxtyping import Array

from gated_jax.stacks import programs


class Plan:
  """The arrays of a scan that are made in stacks.

  A carry that is saved lives in its stack as well: a layer reads what the layer
  before has written, and the stack is longer by one.
  """

  def __init__(self, eqn: Any):
    """Of the scan that an equation stands for."""
    self.length = eqn.params['length']
    body = programs.inner_of(eqn)[0]
    self._fixed, self._count = _counts(eqn.params)
    carry = self._fixed + self._count
    self.slices = body.invars[carry:]
    outputs = body.outvars[self._count :]
    self._avals = [v.aval for v in outputs]
    makers = programs.makers_of(body)
    origins = [
      object() if isinstance(v, core.Literal) else programs.origin(makers, v)
      for v in outputs
    ]
    # One stack for each array, though it may be saved twice.
    first = {v: i for i, v in reversed([*enumerate(origins)])}
    self.written = [
      i
      for i, v in enumerate(origins)
      if first[v] == i
      and (programs.made_here(makers, v) or programs.made_by_kernel(body, v))
    ]
    # Which of the carry, and which output it is.
    self.carried = {
      i: first[v]
      for i, v in enumerate(body.invars[self._fixed : carry])
      if v in first
      and not eqn.params['reverse']
      and programs.made_here(makers, body.outvars[i])
    }
    chosen = {*self.written, *self.carried.values()}
    self.others = [i for i in range(len(outputs)) if i not in chosen]

  def parts(
    self, operands: list[Any]
  ) -> tuple[list[Any], list[Any], list[Any]]:
    """What all layers read, the carry, and what is cut into layers."""
    first, last = self._fixed, self._fixed + self._count
    return operands[:first], operands[first:last], operands[last:]

  def outputs(self, results: list[Any]) -> tuple[list[Any], list[Any]]:
    """The carry, and what is made into stacks."""
    return results[: self._count], results[self._count :]

  def empty(self) -> list[Array]:
    """Stacks that nothing is written into yet."""
    avals = [self._avals[i] for i in self.written]
    return [
      jax.lax.empty((self.length, *aval.shape), aval.dtype) for aval in avals
    ]

  def into(self, stacks: list[Array]) -> dict[int, Array]:
    """The stacks by the number of the body's output."""
    numbers = (self._count + i for i in self.written)
    return dict(zip(numbers, stacks, strict=True))


def _counts(scan: dict[str, Any]) -> tuple[int, int]:
  """Number of operands that are the same on each trip, and of the carry."""
  if 'num_consts' in scan:
    return scan['num_consts'], scan['num_carry']
  constants, carry, _ = map(len, scan['ft_in'].unpack())  # JAX 0.12
  return constants, carry
