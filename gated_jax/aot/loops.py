"""How often a loop of a compiled program runs.

A count is derived where the text does not say it. Scalars are followed as
(loop, element) + offset: the value that element of the loop's state has when
a trip begins, plus a constant. An element whose next value is itself does
not change; one whose next value is itself + n counts in steps of n; the
condition compares such a counter with something that does not change.
"""

import dataclasses
import re

from gated_jax.aot.hlo import Instruction
from gated_jax.aot.hlo import Module

_THROUGH = ('copy', 'bitcast', 'convert', 'reshape', 'broadcast')
_SAME_TUPLE = ('copy', 'opt-barrier')
_MIRROR = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE', 'NE': 'NE'}


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
  """A computation with what its parameters stand for.

  In a loop's body or condition that is the loop's state (`loop`, which
  stands in `outer`); in a fused computation the caller's operands.
  """

  computation: str
  outer: 'Scope | None' = None
  loop: Instruction | None = None
  operands: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scalar:
  """offset, plus an element of a loop's state where `scope` is given."""

  offset: int
  scope: Scope | None = None
  element: int = 0


class Loops:
  """Trip counts within one module."""

  def __init__(self, module: Module):
    self.module = module

  def inner(self, scope: Scope, loop: Instruction, part: str) -> Scope:
    """The scope of a loop's 'body' or 'condition'."""
    return Scope(loop.attribute(part), scope, loop)

  def trips(self, scope: Scope, loop: Instruction) -> int | None:
    """How often the loop runs; None where that depends on data."""
    known = re.search(
      r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes
    )
    if known:
      return int(known.group(1))
    comparison = self._comparison(self.inner(scope, loop, 'condition'))
    if comparison is None:
      return None
    direction, left, right = comparison
    for counter, bound, way in (
      (left, right, direction),
      (right, left, _MIRROR.get(direction, '')),
    ):
      count = self._count(scope, loop, counter, bound, way)
      if count is not None:
        return count
    return None

  def _comparison(
    self, scope: Scope
  ) -> tuple[str, Scalar | None, Scalar | None] | None:
    """The comparison that a condition makes."""
    root = self.module.root(scope.computation)
    while root.op in _THROUGH:
      root = self.module.computations[scope.computation][root.operands[0]]
    if root.op == 'fusion':
      scope = Scope(root.calls, scope, operands=root.operands)
      root = self.module.root(root.calls)
    if root.op != 'compare':
      return None
    left, right = (self.scalar(scope, name) for name in root.operands)
    return root.attribute('direction'), left, right

  def _count(
    self,
    scope: Scope,
    loop: Instruction,
    counter: Scalar | None,
    bound: Scalar | None,
    way: str,
  ) -> int | None:
    if counter is None or counter.scope is None or bound is None:
      return None
    step = self._step(scope, loop, counter.element)
    start = self._start(scope, loop, counter.element)
    last = self._fixed(bound)
    if not step or start is None or last is None:
      return None
    start += counter.offset
    if way in ('LE', 'GE'):
      last += 1 if way == 'LE' else -1
    if way in ('LT', 'LE', 'GT', 'GE', 'NE'):
      return max(-(-(last - start) // step), 0)
    return None

  def _start(self, scope: Scope, loop: Instruction, element: int) -> int | None:
    """The value an element of the state begins with."""
    value = self._element(scope, loop.operands[0], element)
    return None if value is None else self._fixed(value)

  def _step(self, scope: Scope, loop: Instruction, element: int) -> int | None:
    """The number that a trip adds to an element of the state."""
    body = self.inner(scope, loop, 'body')
    root = self.module.root(body.computation)
    value = self._element(body, root.name, element)
    if value is None or value.scope is None or value.element != element:
      return None
    return value.offset if value.scope.loop is loop else None

  def _fixed(self, value: Scalar) -> int | None:
    """A number, where the elements it stands on do not change."""
    if value.scope is None:
      return value.offset
    outer, loop = value.scope.outer, value.scope.loop
    assert outer is not None and loop is not None
    if self._step(outer, loop, value.element) != 0:
      return None
    start = self._start(outer, loop, value.element)
    return None if start is None else start + value.offset

  def _element(self, scope: Scope, name: str, element: int) -> Scalar | None:
    """One element of a tuple."""
    i = self.module.computations[scope.computation].get(name)
    while i is not None and i.op in _SAME_TUPLE:
      i = self.module.computations[scope.computation].get(i.operands[0])
    if i is None:
      return None
    if i.op == 'tuple':
      return self.scalar(scope, i.operands[element])
    if i.op == 'parameter' and scope.loop is not None:
      return Scalar(0, scope, element)
    if i.op == 'fusion':
      fused = Scope(i.calls, scope, operands=i.operands)
      return self._element(fused, self.module.root(i.calls).name, element)
    if i.op == 'while' and self._step(scope, i, element) == 0:
      return self._element(scope, i.operands[0], element)
    return None

  def scalar(self, scope: Scope, name: str) -> Scalar | None:
    """The value of an instruction, None where it is not of this form."""
    i = self.module.computations[scope.computation].get(name)
    if i is None:
      return None
    if i.op == 'constant':
      whole = re.fullmatch(r'\s*(-?\d+)\s*', i.inside)
      return Scalar(int(whole.group(1))) if whole else None
    if i.op in (*_THROUGH, 'opt-barrier') and i.operands:
      return self.scalar(scope, i.operands[0])
    if i.op in ('add', 'subtract', 'multiply'):
      left, right = (self.scalar(scope, o) for o in i.operands)
      return _arithmetic(i.op, left, right)
    if i.op == 'get-tuple-element':
      index = int(i.attribute('index'))
      return self._element(scope, i.operands[0], index)
    if i.op == 'parameter' and scope.operands and scope.outer is not None:
      return self.scalar(scope.outer, scope.operands[int(i.inside)])
    if i.op == 'fusion':
      fused = Scope(i.calls, scope, operands=i.operands)
      return self.scalar(fused, self.module.root(i.calls).name)
    return None


def _arithmetic(
  op: str, left: Scalar | None, right: Scalar | None
) -> Scalar | None:
  if left is None or right is None:
    return None
  if op == 'multiply':
    if left.scope or right.scope:
      return None
    return Scalar(left.offset * right.offset)
  if op == 'add' and left.scope is None:
    left, right = right, left
  if right.scope is not None:
    return None
  sign = 1 if op == 'add' else -1
  return Scalar(left.offset + sign * right.offset, left.scope, left.element)
