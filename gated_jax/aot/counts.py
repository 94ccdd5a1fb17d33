"""How often each part of a Pallas kernel runs, by its own program.

A kernel's branches and loops depend on the step of the grid, on lengths, and
on tables that are known before the call (splash's blocks). So its jaxpr can be
walked for every step with those numbers alone: vectors are left unknown, only
what decides where to go is computed. `schedule.py` has the price of each part,
this file the count.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

_INLINE = ('pjit', 'jit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call')


class Unknown(Exception):
  """A branch that depends on what only a run would tell."""


@dataclasses.dataclass
class Part:
  """A kernel's body, a branch, or the body of a loop, without those inside."""

  loop: bool
  work: bool = True  # False: it is empty
  flops: float = 0.0  # matrix products of one run
  runs: int = 0
  inside: dict[Any, 'Part'] = dataclasses.field(default_factory=dict)

  def walk(self) -> Iterator['Part']:
    """This and all inside, as the program has them."""
    yield self
    for part in self.inside.values():
      yield from part.walk()


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One Pallas call: its grid, and its parts with their counts."""

  name: str
  grid: tuple[int, ...]
  body: Part


def kernels(function: Callable, *arguments: Any) -> list[Kernel]:
  """The Pallas calls of a function of abstract arrays, in order."""
  closed = jax.make_jaxpr(function)(*arguments)
  calls: list[Kernel] = []
  unknown = [None] * len(closed.jaxpr.invars)
  _outer(closed, unknown, calls)
  return calls


def _inner(eqn: Any) -> Any:
  """The closed jaxpr that an equation stands for, or None."""
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(key)
    if isinstance(inner, core.Jaxpr):
      return core.ClosedJaxpr(inner, ())
    if inner is not None:
      return inner
  return None


class _Values:
  """Values of variables, as far as they are known; None for others."""

  def __init__(self, closed: Any, given: list[Any]):
    self.known: dict[Any, Any] = {}
    jaxpr = closed.jaxpr
    self.put(jaxpr.constvars, closed.consts)
    self.put(jaxpr.invars, given)

  def put(self, variables: Any, values: Any) -> None:
    """Remembers those values that are known."""
    for variable, value in zip(variables, values, strict=True):
      if value is not None:
        self.known[variable] = value

  def get(self, variables: Any) -> list[Any]:
    """Values of variables and literals; None where one is not known."""
    return [
      v.val if isinstance(v, core.Literal) else self.known.get(v)
      for v in variables
    ]


def _outer(closed: Any, given: list[Any], found: list[Kernel]) -> list[Any]:
  """Walks the program around kernels, for the tables they are given."""
  values = _Values(closed, given)
  for eqn in closed.jaxpr.eqns:
    inputs = values.get(eqn.invars)
    if eqn.primitive.name == 'pallas_call':
      found.append(_kernel(eqn, inputs))
      continue
    inner = _inner(eqn)
    if inner is not None:
      if len(inner.jaxpr.invars) == len(inputs):
        values.put(eqn.outvars, _outer(inner, inputs, found))
    elif inputs and all(x is not None for x in inputs):
      results = eqn.primitive.bind(*inputs, **eqn.params)
      many = eqn.primitive.multiple_results
      values.put(eqn.outvars, results if many else [results])
  return values.get(closed.jaxpr.outvars)


def _kernel(eqn: Any, inputs: list[Any]) -> Kernel:
  mapping = eqn.params['grid_mapping']
  bounds = mapping.num_dynamic_grid_bounds
  dynamic = iter(inputs[:bounds])
  grid = tuple(
    n if isinstance(n, int) else int(next(dynamic)) for n in mapping.grid
  )
  jaxpr = eqn.params['jaxpr']
  closed = core.ClosedJaxpr(jaxpr, ())
  tables = inputs[bounds : bounds + mapping.num_index_operands]
  tables = [None if t is None else np.asarray(t) for t in tables]
  given = tables + [None] * (len(jaxpr.invars) - len(tables))
  body = Part(False)
  _parts(closed, body, ())
  # The kernel does not see an axis that vmap added.
  seen = [i for i in range(len(grid)) if i not in mapping.vmapped_dims]
  walk = _Walk(tuple(grid[i] for i in seen))
  for step in itertools.product(*map(range, grid)):
    walk.index = tuple(step[i] for i in seen)
    walk.run(closed, given, body, ())
  return Kernel(eqn.params['name'], grid, body)


def _parts(closed: Any, part: Part, at: tuple[int, ...]) -> None:
  """Fills a part with what is inside, and its products."""
  for i, eqn in enumerate(closed.jaxpr.eqns):
    name, place = eqn.primitive.name, (*at, i)
    if name == 'dot_general':
      (summed, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in summed)
      part.flops += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name in _INLINE:
      _parts(_inner(eqn), part, place)
    else:
      for key, loop, inner in _branches(eqn):
        if loop and eqn.params.get('unroll', 1) >= eqn.params.get('length', 2):
          for turn in range(eqn.params['length']):
            _parts(inner, part, (*place, turn))
        else:
          part.inside[*place, key] = Part(loop, bool(inner.jaxpr.eqns))
          _parts(inner, part.inside[*place, key], ())


def _branches(eqn: Any) -> list[tuple[int, bool, Any]]:
  """(number, whether it is a loop, program) of what an equation may run."""
  if eqn.primitive.name == 'cond':
    return [(k, False, b) for k, b in enumerate(eqn.params['branches'])]
  if eqn.primitive.name == 'while':
    return [(0, True, eqn.params['body_jaxpr'])]
  if eqn.primitive.name == 'scan':
    return [(0, True, eqn.params['jaxpr'])]
  return []


# Primitives on Python's numbers: all that kernels decide with.
_SCALARS: dict[str, Callable] = {
  'add': operator.add,
  'sub': operator.sub,
  'mul': operator.mul,
  'neg': operator.neg,
  'abs': abs,
  'max': max,
  'min': min,
  'div': lambda a, b: int(a / b),  # towards zero
  'rem': lambda a, b: int(math.fmod(a, b)),
  'sign': lambda x: (x > 0) - (x < 0),
  'lt': operator.lt,
  'le': operator.le,
  'gt': operator.gt,
  'ge': operator.ge,
  'eq': operator.eq,
  'ne': operator.ne,
  'and': operator.and_,
  'or': operator.or_,
  'not': operator.not_,
  'select_n': lambda which, *cases: cases[int(which)],
  'clamp': lambda low, x, high: min(max(low, x), high),
  'convert_element_type': lambda x: x,
  'multiple_of': lambda x: x,
}
_BRANCHES = ('cond', 'while', 'scan')
_INDICES = ('program_id', 'num_programs')


class _Walk:
  """Walks a kernel's program for the step of the grid at `index`."""

  def __init__(self, grid: tuple[int, ...]):
    self.grid, self.index = grid, (0,) * len(grid)
    self.short: dict[int, Any] = {}

  def _equations(self, jaxpr: Any) -> list[tuple[int, Any, str]]:
    """Those that may decide where to go: scalars, and what holds others."""
    if id(jaxpr) not in self.short:
      self.short[id(jaxpr)] = [
        (i, eqn, name)
        for i, eqn in enumerate(jaxpr.eqns)
        if (name := eqn.primitive.name) in (*_INLINE, *_BRANCHES, *_INDICES)
        or (
          (name in _SCALARS or name == 'get') and not eqn.outvars[0].aval.shape
        )
      ]
    return self.short[id(jaxpr)]

  def run(
    self, closed: Any, given: list[Any], part: Part, at: tuple[int, ...]
  ) -> list[Any]:
    """Counts what this step runs of a part; its results, as far as known."""
    values = _Values(closed, given)
    part.runs += not at
    for i, eqn, name in self._equations(closed.jaxpr):
      inputs, place = values.get(eqn.invars), (*at, i)
      results: list[Any] = []
      if name in _INDICES:
        of = self.index if name == 'program_id' else self.grid
        results = [of[eqn.params['axis']]]
      elif name in _INLINE:
        results = self.run(_inner(eqn), inputs, part, place)
      elif name == 'cond':
        results = self._cond(eqn, inputs, part, place)
      elif name == 'while':
        results = self._while(eqn, inputs, part, place)
      elif name == 'scan':
        self._scan(eqn, inputs, part, place)
      elif name == 'get':
        if inputs[0] is not None:
          results = [_read(eqn, inputs)]
      elif all(x is not None for x in inputs):
        results = [_SCALARS[name](*inputs)]
      if results:
        values.put(eqn.outvars, results)
    return values.get(closed.jaxpr.outvars)

  def _cond(
    self, eqn: Any, inputs: list[Any], part: Part, place: tuple[int, ...]
  ) -> list[Any]:
    if inputs[0] is None:
      raise Unknown(str(eqn.source_info.name_stack) or 'a branch')
    which = int(inputs[0])
    inner = eqn.params['branches'][which]
    return self.run(inner, inputs[1:], part.inside[*place, which], ())

  def _while(
    self, eqn: Any, inputs: list[Any], part: Part, place: tuple[int, ...]
  ) -> list[Any]:
    ahead, behind = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
    test, fixed = inputs[:ahead], inputs[ahead : ahead + behind]
    carried = inputs[ahead + behind :]
    nothing = Part(False)
    while True:
      (more,) = self.run(eqn.params['cond_jaxpr'], test + carried, nothing, ())
      if more is None:
        raise Unknown('a loop')
      if not more:
        return carried
      carried = self.run(
        eqn.params['body_jaxpr'], fixed + carried, part.inside[*place, 0], ()
      )

  def _scan(
    self, eqn: Any, inputs: list[Any], part: Part, place: tuple[int, ...]
  ) -> None:
    length, inner = eqn.params['length'], eqn.params['jaxpr']
    # A kernel's scan slices no inputs and stacks no outputs.
    fixed = len(inputs) - len(eqn.outvars)
    given, carried = inputs[:fixed], inputs[fixed:]
    unrolled = eqn.params['unroll'] >= length
    body = part if unrolled else part.inside[*place, 0]
    for turn in range(length):
      at = (*place, turn) if unrolled else ()
      carried = self.run(inner, given + carried, body, at)


def _read(eqn: Any, inputs: list[Any]) -> Any:
  """An element of a table, where its place is known."""
  transforms = jax.tree.unflatten(eqn.params['tree'], inputs[1:])
  where = transforms[0].indices if transforms else ()
  if any(not isinstance(i, int | np.integer) for i in where):
    return None
  element = inputs[0][tuple(int(i) for i in where)]
  return element.item() if np.ndim(element) == 0 else None
