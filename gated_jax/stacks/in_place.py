"""Kernels read and write the stacks of a scan where they lie.

A scan over layers saves for backward a stack of each array that backward reads.
XLA's products write into a stack, and read from one. Its Pallas kernels do
neither: their outputs are copied into stacks, and a layer's part of a stack is
copied out before a kernel reads it.

`in_place` takes the program of a gradient, in which forward and backward are
two scans, and gives kernels the stack itself and the number of the layer. What
is saved is made in its stack, and read there by all that follows. The numbers
that are computed are the same, but that XLA rounds to bfloat16 where its
fusions end, and these are others.

    programs.py   which arrays those are
    plan.py       the same of a whole scan
    slices.py     a layer's part of a stack that nobody has read yet
    kernels.py    a kernel that is given stacks
"""

import contextlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array

from gated_jax.stacks import kernels
from gated_jax.stacks import programs
from gated_jax.stacks.plan import Plan
from gated_jax.stacks.slices import Slice

Value = Any  # an array, or a slice that nobody has read


def in_place(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function; kernels inside of its scans use stacks in place.

  Args:
    function: of arrays, in any trees, that computes gradients: the result has
      no rules for them itself.
  """

  def same(*args: Any) -> Any:
    """The function, on other equations."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    leaves = jax.tree.leaves(args)
    if programs.contains(closed.jaxpr, 'scan', kernels.NAME):
      results = _Program().run(closed.jaxpr, closed.consts, leaves)
    else:
      results = core.jaxpr_as_fun(closed)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), results)

  return same


def _under(eqn: Any, *more: str) -> contextlib.AbstractContextManager:
  """Names what is made in an equation's place as the equation is named."""
  name = '/'.join([*filter(None, [str(eqn.source_info.name_stack)]), *more])
  return jax.named_scope(name) if name else contextlib.nullcontext()


class Longer(NamedTuple):
  """A stack with one entry more than there are layers."""

  stack: Array


class _Program:
  """Evaluates programs around scans, and those of one layer within."""

  def __init__(self, layer: Array | None = None):
    """Outside of a scan there is no layer."""
    self.layer = layer
    self.saved: list[Array] = []  # stacks that earlier scans have written
    # How variables are split that are written into stacks. Where the program
    # says so only of what is read from a stack, XLA's partitioner would choose
    # another way for the stack, and send each layer's part twice.
    self.places: dict[Any, NamedSharding | None] = {}

  def read(self, value: Value) -> Array:
    """An array, wherever it lies."""
    if isinstance(value, Slice):
      assert self.layer is not None
      return value.read(self.layer)
    return value.stack[:-1] if isinstance(value, Longer) else value

  def run(
    self,
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Value],
    stacks: dict[int, Array] | None = None,
  ) -> list[Value]:
    """The outputs of a program.

    Args:
      jaxpr: the program.
      consts: its constants.
      args: its arguments.
      stacks: by the number of an output that is made in the program, the stack
        that it is written into. The output is then a slice of it.
    """
    values: dict[Any, Value] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    makers = programs.makers_of(jaxpr)
    wanted = {
      programs.origin(makers, jaxpr.outvars[i]): stack
      for i, stack in (stacks or {}).items()
    }
    self.places |= {v: programs.place(jaxpr, v) for v in wanted}

    def value(variable: Any) -> Value:
      """Of a variable or a literal."""
      if isinstance(variable, core.Literal):
        return np.asarray(variable.val, getattr(variable.aval, 'dtype', None))
      return values[variable]

    for eqn in jaxpr.eqns:
      operands = [value(v) for v in eqn.invars]
      into = {i: wanted[v] for i, v in enumerate(eqn.outvars) if v in wanted}
      results = self._equation(eqn, operands, into)
      values.update(zip(eqn.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]

  def _equation(
    self, eqn: Any, operands: list[Value], stacks: dict[int, Array]
  ) -> list[Value]:
    """The outputs of one equation."""
    name = eqn.primitive.name
    if self.layer is None:
      if name == 'scan' and programs.has(eqn, kernels.NAME):
        return self._scan(eqn, operands)
      if programs.is_call(eqn) and programs.has(eqn, 'scan', kernels.NAME):
        return self._call(eqn, operands, stacks)
    if stacks or any(isinstance(x, Slice) for x in operands):
      same = programs.unchanged(eqn)
      if same is not None and isinstance(operands[same], Slice):
        return [_passed(eqn, same, operands)]
      if programs.is_call(eqn):
        return self._call(eqn, operands, stacks)
      if name == 'shard_map':
        return self._on_devices(eqn, operands, stacks)
      if name == kernels.NAME:
        return self._kernel(eqn, operands, stacks)
      if name in ('reshape', 'transpose'):
        seen = _seen(eqn, operands[0])
        if seen is not None:
          return [seen]
    results = programs.alone(eqn, [self.read(x) for x in operands])
    for i, stack in stacks.items():
      place = self.places.get(eqn.outvars[i])
      if place is not None:
        results[i] = jax.lax.with_sharding_constraint(results[i], place)
      results[i] = Slice.of(_written(stack, results[i], self.layer))
    return results

  def _call(
    self, eqn: Any, operands: list[Value], stacks: dict[int, Array]
  ) -> list[Value]:
    """A program in the place of the equation that stands for it."""
    name = eqn.primitive.name
    added = {'jit': f'jit({eqn.params.get("name")})'}
    added |= dict.fromkeys(programs.REMAT, 'checkpoint')
    with _under(eqn, *filter(None, [added.get(name)])):
      return self.run(*programs.inner_of(eqn), operands, stacks)

  def _kernel(
    self, eqn: Any, operands: list[Value], stacks: dict[int, Array]
  ) -> list[Value]:
    """A kernel; arrays that cannot be read in place are read before."""
    assert self.layer is not None

    def stays(i: int, x: Value) -> bool:
      """Whether the kernel reads it in place."""
      whole = isinstance(x, Slice) and x.as_it_lies
      return whole and kernels.can_read(eqn, i)

    given = [x if stays(i, x) else self.read(x) for i, x in enumerate(operands)]
    if not stacks and not any(isinstance(x, Slice) for x in given):
      return programs.alone(eqn, given)
    with _under(eqn):
      results = kernels.call(eqn, self.layer, given, stacks)
    return [Slice.of(x) if i in stacks else x for i, x in enumerate(results)]

  def _on_devices(
    self, eqn: Any, operands: list[Value], stacks: dict[int, Array]
  ) -> list[Value]:
    """A program on each device, which is given its part of every stack."""
    assert self.layer is not None
    params, (inner, consts) = eqn.params, programs.inner_of(eqn)
    mesh = params['mesh']
    given: list[Array] = []
    in_specs: list[PartitionSpec] = []
    lazy = []
    for x, spec in zip(operands, params['in_specs'], strict=True):
      axes = x.split(tuple(spec)) if isinstance(x, Slice) else None
      lazy.append(axes is not None)
      in_specs.append(spec if axes is None else PartitionSpec(*axes))
      given.append(x.stack if lazy[-1] else self.read(x))
    out_specs = dict(enumerate(params['out_specs']))
    passed: dict[int, Value] = {}
    for i, v in enumerate(inner.outvars):
      spec = params['out_specs'][i]
      at = programs.passed_on(inner, v, shape=False)
      if i in stacks:
        out_specs[i] = PartitionSpec(None, *spec)
      elif at is not None and lazy[at]:
        x = operands[at].reshaped(eqn.outvars[i].aval.shape)
        axes = x.split(tuple(spec))
        lying = programs.splitting(mesh, in_specs[at])
        if axes is not None and programs.splitting(mesh, axes) == lying:
          passed[i] = x
          del out_specs[i]

    def whole(layer: Array, into: list[Array], *parts: Array) -> list[Array]:
      """On one device."""
      args = [
        Slice.of(x, v.aval.shape) if is_lazy else x
        for x, v, is_lazy in zip(parts, inner.invars, lazy, strict=True)
      ]
      program = _Program(layer)
      written = dict(zip(stacks, into, strict=True))
      results = program.run(inner, consts, args, written)
      return [
        results[i].stack if i in stacks else program.read(results[i])
        for i in out_specs
      ]

    with _under(eqn):
      results = jax.shard_map(
        whole,
        mesh=mesh,
        in_specs=(PartitionSpec(), [out_specs[i] for i in stacks], *in_specs),
        out_specs=list(out_specs.values()),
        axis_names=params['newly_manual_axes'],
        check_vma=params['check_vma'],
      )(self.layer, list(stacks.values()), *given)
    made = zip(out_specs, results, strict=True)
    passed |= {i: Slice.of(x) if i in stacks else x for i, x in made}
    return [passed[i] for i in range(len(eqn.outvars))]

  def _scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
    """A scan whose kernels use stacks in place."""
    params, (body, consts) = eqn.params, programs.inner_of(eqn)
    plan = Plan(eqn)
    fixed, carry, xs = plan.parts(operands)
    read = {}
    for i, (x, v) in enumerate(zip(xs, plan.slices, strict=True)):
      saved = any(x is stack for stack in self.saved)
      if isinstance(x, Longer) or (saved and programs.read_by_kernel(body, v)):
        stack = x.stack if isinstance(x, Longer) else x
        read[i] = Slice.of(stack, place=programs.place(body, v))
    moving = {i: x for i, x in enumerate(xs) if i not in read}
    for i in plan.carried:
      more = (params['length'] + 1, *carry[i].shape)
      empty = jax.lax.empty(more, carry[i].dtype)
      carry[i] = _written(empty, carry[i], 0)

    def layer(state: Any, x: Any) -> tuple[Any, list[Array]]:
      """One trip."""
      (carry, stacks), (number, moving) = state, x
      program = _Program(number)
      before = [
        Slice.of(x) if i in plan.carried else x for i, x in enumerate(carry)
      ]
      slices = [read[i] if i in read else moving[i] for i in range(len(xs))]
      args = [*fixed, *before, *slices]
      results = program.run(body, consts, args, plan.into(stacks))
      after, ys = plan.outputs(results)
      after = [program.read(x) for x in after]
      for i in plan.carried:
        after[i] = _written(carry[i], after[i], number + 1)
      stacks = [ys[i].stack for i in plan.written]
      rest = [program.read(ys[i]) for i in plan.others]
      return (after, stacks), rest

    with _under(eqn):
      (carry, stacks), rest = jax.lax.scan(
        layer,
        (carry, plan.empty()),
        (jnp.arange(params['length'], dtype=jnp.int32), moving),
        length=params['length'],
        reverse=params['reverse'],
        unroll=params['unroll'],
      )
    ys: dict[int, Any] = dict(zip(plan.written, stacks, strict=True))
    ys |= dict(zip(plan.others, rest, strict=True))
    for i, y in plan.carried.items():
      ys[y] = Longer(carry[i])
      carry[i] = carry[i][-1]
    self.saved += ys.values()
    return [*carry, *(ys[i] for i in range(len(ys)))]


def _passed(eqn: Any, at: int, operands: Sequence[Value]) -> Slice:
  """A slice after an equation that changes none of its numbers."""

  def step(x: Array) -> Array:
    """The equation, which may still say how the array is to lie."""
    return programs.alone(eqn, [*operands[:at], x, *operands[at + 1 :]])[0]

  return operands[at].then(step)


def _written(stack: Array, x: Array, layer: Any) -> Array:
  return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)


def _seen(eqn: Any, x: Value) -> Slice | None:
  """A slice in another shape or order; None: it has to be read."""
  if not isinstance(x, Slice):
    return None
  if eqn.primitive.name == 'transpose':
    return x.transposed(eqn.params['permutation'])
  return x.reshaped(eqn.params['new_sizes']) if x.in_order else None
