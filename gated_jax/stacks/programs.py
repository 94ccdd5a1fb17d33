"""Questions about programs as JAX writes them down, and one equation alone.

A program is a jaxpr. Some of its equations stand for a program themselves.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding
from jaxtyping import Array

from gated_jax.stacks import kernels

# Equations that stand for a program, and add nothing to it.
REMAT = ('remat2', 'checkpoint')
CALLS = ('jit', 'closed_call', 'custom_vjp_call', 'custom_jvp_call', *REMAT)
# Equations whose output is their input, as far as numbers go.
NAMES = ('name', 'layout_constraint', 'sharding_constraint')


def contains(jaxpr: Any, *names: str) -> bool:
  """Whether there is an equation of each name, each within the one before."""
  for eqn in jaxpr.eqns:
    rest = names[1:] if eqn.primitive.name == names[0] else names
    if not rest or has(eqn, *rest):
      return True
  return False


def has(eqn: Any, *names: str) -> bool:
  """Whether the programs of an equation contain these."""
  inside = core.jaxprs_in_params(eqn.params)
  return any(contains(inner, *names) for inner in inside)


def inner_of(eqn: Any) -> tuple[Any, Sequence[Any]]:
  """The one program that an equation stands for, and its constants."""
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(key)
    if isinstance(inner, core.ClosedJaxpr):
      return inner.jaxpr, inner.consts
    if inner is not None:
      return inner, ()
  raise AssertionError(f'{eqn.primitive} stands for no program')


def is_call(eqn: Any) -> bool:
  """Whether the equation's program can stand in its place."""
  return eqn.primitive.name in CALLS and not eqn.params.get('prevent_cse')


def unchanged(eqn: Any) -> int | None:
  """The operand that the only output is equal to, if that is known."""
  name, operand = eqn.primitive.name, eqn.invars and eqn.invars[0].aval
  if name in NAMES:
    return 0
  if name == 'pad':
    return None if any(map(any, eqn.params['padding_config'])) else 0
  if name == 'reduce_precision' and jnp.issubdtype(operand.dtype, jnp.floating):
    kind = jnp.finfo(operand.dtype)
    wide = kind.nexp, kind.nmant
    given = eqn.params['exponent_bits'], eqn.params['mantissa_bits']
    return 0 if wide == given else None
  if name == 'cond' and len(eqn.outvars) == 1:  # one branch for each platform
    branches = [branch.jaxpr for branch in eqn.params['branches']]
    passed = {passed_on(inner, inner.outvars[0]) for inner in branches}
    at = passed.pop() if len(passed) == 1 else None
    return None if at is None else at + 1
  if (is_call(eqn) or name == 'shard_map') and len(eqn.outvars) == 1:
    inner = inner_of(eqn)[0]
    at = passed_on(inner, inner.outvars[0])
    if at is not None and name == 'shard_map':
      mesh = eqn.params['mesh']
      specs = eqn.params['in_specs'][at], eqn.params['out_specs'][0]
      before, after = (splitting(mesh, spec) for spec in specs)
      return at if before == after else None
    return at
  return None


def splitting(mesh: Any, spec: Iterable[Any]) -> list[tuple[str, ...]]:
  """For each axis of an array, the mesh axes that do split it."""
  axes = [x if isinstance(x, tuple) else (x,) for x in spec]
  split = [tuple(a for a in x if a and mesh.shape[a] > 1) for x in axes]
  while split and not split[-1]:
    split.pop()
  return split


def makers_of(jaxpr: Any) -> dict[Any, tuple[Any, int]]:
  """The equation that makes a variable, and which of its outputs it is."""
  return {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}


def origin(
  makers: dict[Any, tuple[Any, int]], variable: Any, shape: bool = True
) -> Any:
  """The variable that this one is equal to and that is made first.

  Args:
    makers: of the program.
    variable: of the program.
    shape: whether it must have the same shape.
  """
  while not isinstance(variable, core.Literal) and variable in makers:
    eqn, _ = makers[variable]
    at = unchanged(eqn)
    if at is None and not shape and eqn.primitive.name == 'reshape':
      at = 0
    if at is None or isinstance(eqn.invars[at], core.Literal):
      break
    variable = eqn.invars[at]
  return variable


def passed_on(jaxpr: Any, variable: Any, shape: bool = True) -> int | None:
  """The number of the argument that a variable of a program is equal to.

  Args:
    jaxpr: the program.
    variable: of the program.
    shape: whether it must have the same shape.
  """
  if isinstance(variable, core.Literal):
    return None
  variable = origin(makers_of(jaxpr), variable, shape)
  invars = list(jaxpr.invars)
  return invars.index(variable) if variable in invars else None


def made_by_kernel(jaxpr: Any, variable: Any) -> bool:
  """Whether a kernel makes this, which could write it elsewhere."""
  if isinstance(variable, core.Literal):
    return False
  makers = makers_of(jaxpr)
  variable = origin(makers, variable)
  if variable not in makers:
    return False
  eqn, output = makers[variable]
  if eqn.primitive.name == kernels.NAME:
    return kernels.can_write(eqn, output)
  if is_call(eqn) or eqn.primitive.name == 'shard_map':
    inner = inner_of(eqn)[0]
    return made_by_kernel(inner, inner.outvars[output])
  return False


def read_by_kernel(jaxpr: Any, variable: Any) -> bool:
  """Whether a kernel reads this, as it is or in another shape."""
  same = {variable}
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    places = [
      i
      for i, v in enumerate(eqn.invars)
      if not isinstance(v, core.Literal) and v in same
    ]
    if not places:
      continue
    if name in ('reshape', 'transpose') or unchanged(eqn) in places:
      same.add(eqn.outvars[0])
    elif name == kernels.NAME:
      if any(kernels.can_read(eqn, i) for i in places):
        return True
    elif is_call(eqn) or name == 'shard_map':
      inner = inner_of(eqn)[0]
      if any(read_by_kernel(inner, inner.invars[i]) for i in places):
        return True
      for v, out in zip(inner.outvars, eqn.outvars, strict=True):
        if passed_on(inner, v, shape=False) in places:
          same.add(out)
  return False


def place(jaxpr: Any, variable: Any) -> NamedSharding | None:
  """How an array is split where the program says so first; None: nowhere."""
  same = {variable}
  for eqn in jaxpr.eqns:
    operands = [isinstance(v, core.Var) and v in same for v in eqn.invars]
    if not any(operands):
      continue
    at, name = operands.index(True), eqn.primitive.name
    found = None
    if name == 'sharding_constraint':
      found = eqn.params['sharding']
    elif name == 'shard_map':
      found = NamedSharding(eqn.params['mesh'], eqn.params['in_specs'][at])
    elif is_call(eqn):
      inner = inner_of(eqn)[0]
      found = place(inner, inner.invars[at])
    if found is not None:
      return found
    if unchanged(eqn) == at:
      same.add(eqn.outvars[0])
  return None


def made_here(makers: dict[Any, tuple[Any, int]], variable: Any) -> bool:
  """Whether an equation that stands for no program makes this."""
  if isinstance(variable, core.Literal):
    return False
  eqn, _ = makers.get(origin(makers, variable), (None, 0))
  return eqn is not None and not any(core.jaxprs_in_params(eqn.params))


def alone(eqn: Any, operands: Sequence[Array]) -> list[Any]:
  """An equation as it stands."""
  variables, values = [], []
  for variable, value in zip(eqn.invars, operands, strict=True):
    if not isinstance(variable, core.Literal) and variable not in variables:
      variables.append(variable)
      values.append(value)
  info = core.DebugInfo('in_place', eqn.primitive.name, None, None)
  jaxpr = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, info)
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*values)
