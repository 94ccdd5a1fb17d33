"""What a compiled program does in one run: cycles, FLOPs, bytes, kernels.

The control flow is walked from the entry: a loop's body counts as often as
it runs, of a conditional the dearest branch counts, and a fusion is a leaf
whose own estimate covers what is in it. The walk yields one `Visit` for each
instruction reached; everything else here is a sum over visits.

The text has no estimate for Pallas kernels, collectives, asynchronous
copies, sorts and most gathers; they are counted and sized instead. All
figures are per device, and estimates: nothing was run.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from gated_jax.aot import hlo
from gated_jax.aot.hlo import Instruction
from gated_jax.aot.loops import Loops
from gated_jax.aot.loops import Scope

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
KERNEL = 'tpu_custom_call'
_COPIES = (
  'copy-start',
  'slice-start',
  'dynamic-slice-start',
  'dynamic-update-slice-start',
)
_MOVES = re.compile(
  r'%(copy|transpose|bitcast|slice|dynamic-slice|dynamic-update)'
)


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction that runs `times` times."""

  computation: str
  instruction: Instruction
  times: int


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop that runs, in all, `times` times `trips`."""

  name: str
  op_name: str
  trips: int  # 1 where not known
  known: bool
  times: int
  cycles: int  # of one trip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, and how often it runs."""

  kind: str
  groups: tuple[tuple[int, ...], ...]  # partitions that talk to each other
  payload: int  # bytes of the array over the whole group
  wire: float  # bytes each device sends, were the group a ring
  asynchronous: bool
  times: int
  op_name: str
  shape: str

  @property
  def size(self) -> int:
    """Devices in a group."""
    return len(self.groups[0])


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Pallas calls of one name on operands of one shape."""

  name: str
  operands: tuple[str, ...]
  output: str
  flops: int  # declared by its author; 0: nothing declared
  calls: int
  op_name: str


def phase(op_name: str) -> str:
  """Which pass of training an operation belongs to."""
  if 'rematted_computation' in op_name:
    return 'recomputation'
  if 'transpose(' in op_name:
    return 'backward'
  return 'forward' if 'jvp(' in op_name else 'other'


class Program:
  """A compiled program's figures, from `compiled.as_text()`."""

  def __init__(self, text: str):
    self.module = hlo.parse(text)
    self.loops: list[Loop] = []
    self._loops = Loops(self.module)
    self.visits = list(self._walk(Scope(self.module.entry), 1))
    self._matmul = {
      v.instruction: self.module.flops(v.computation, v.instruction)
      for v in self.visits
    }

  # The walk.

  def _walk(self, scope: Scope, times: int) -> Iterator[Visit]:
    """Every instruction that control reaches, loops inside out."""
    for i in self.module.computations[scope.computation].values():
      yield Visit(scope.computation, i, times)
      if i.op == 'while':
        yield from self._walk_loop(scope, i, times)
      elif i.op == 'conditional':
        yield from self._dearest(scope, i, times)
      elif i.op == 'call':
        yield from self._walk(Scope(i.attribute('to_apply'), scope), times)
      elif i.op == 'async-start' and not self._communicates(i.calls):
        yield from self._walk(Scope(i.calls, scope), times)

  def _walk_loop(
    self, scope: Scope, loop: Instruction, times: int
  ) -> Iterator[Visit]:
    trips = self._loops.trips(scope, loop)
    total = times * (1 if trips is None else trips)
    visits = [
      visit
      for part in ('body', 'condition')
      for visit in self._walk(self._loops.inner(scope, loop, part), total)
    ]
    cycles = _cycles(visits) // total if total else 0
    self.loops.append(
      Loop(
        loop.name,
        loop.op_name,
        1 if trips is None else trips,
        trips is not None,
        times,
        cycles,
      )
    )
    yield from visits

  def _dearest(
    self, scope: Scope, i: Instruction, times: int
  ) -> Iterator[Visit]:
    names = re.findall(r'%[^\s,}]+', i.attribute('branch_computations')) or [
      i.attribute(f'{which}_computation') for which in ('true', 'false')
    ]
    branches = []
    for name in names:
      before = len(self.loops)
      visits = list(self._walk(Scope(name, scope), times))
      branches.append((visits, self.loops[before:]))
      del self.loops[before:]

    def cost(branch):
      flops = sum(
        self.module.flops(v.computation, v.instruction) * v.times
        for v in branch[0]
      )
      return _cycles(branch[0]), flops

    visits, loops = max(branches, key=cost)
    self.loops += loops
    yield from visits

  def _communicates(self, computation: str) -> bool:
    inside = self.module.computations.get(computation, {}).values()
    return any(i.op in COLLECTIVES for i in inside)

  # Sums.

  @property
  def partitions(self) -> int:
    return self.module.partitions

  @property
  def cycles(self) -> int:
    """Estimated, of everything that has an estimate."""
    return _cycles(self.visits)

  @property
  def flops(self) -> int:
    """Of matmuls outside Pallas kernels."""
    return sum(self._matmul[v.instruction] * v.times for v in self.visits)

  def cycles_by_kind(self) -> dict[str, int]:
    """Keys: matmul, data movement, elementwise."""
    found: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      i = v.instruction
      if self._matmul[i]:
        kind = 'matmul'
      elif i.op in ('copy', 'transpose') or _MOVES.match(i.name):
        kind = 'data movement'
      else:
        kind = 'elementwise'
      found[kind] += (i.cycles or 0) * v.times
    return dict(found)

  def cycles_by_phase(self) -> dict[str, int]:
    """Keys: forward, backward, recomputation, other."""
    found: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      i = v.instruction
      found[phase(i.op_name)] += (i.cycles or 0) * v.times
    return {name: cycles for name, cycles in found.items() if cycles}

  def dearest(self, count: int) -> list[tuple[int, Visit]]:
    """The instructions with the most cycles, all their runs together."""
    found = [((v.instruction.cycles or 0) * v.times, v) for v in self.visits]
    return sorted(found, key=lambda pair: -pair[0])[:count]

  def copied_bytes(self) -> int:
    """Moved by asynchronous copies, between memories of one device."""
    return sum(
      v.times * _copied(v.instruction)
      for v in self.visits
      if v.instruction.op in _COPIES
    )

  def without_estimate(self) -> dict[str, int]:
    """Runs of operations with a cost that no estimate covers, by op."""
    found: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      i = v.instruction
      covered = i.cycles is not None or i.target in (
        'AllocateBuffer',
        'ConcatBitcast',
        KERNEL,
      )
      if not covered and i.op in (
        'fusion',
        'sort',
        'scatter',
        'gather',
        'custom-call',
      ):
        found[i.target or re.sub(r'[.\d]+$', '', i.name[1:])] += v.times
    return dict(found)

  def kernels(self) -> list[Kernel]:
    """Pallas kernels, equal calls together."""
    found: dict[tuple, Kernel] = {}
    for v in self.visits:
      i = v.instruction
      if i.target == KERNEL:
        types = self.module.operand_types(v.computation, i)
        declared = re.search(r'"flops":"?(\d+)', i.attributes)
        kernel = Kernel(
          name=_kernel_name(i),
          operands=tuple(_without_layout(t) for t in types),
          output=_without_layout(i.type),
          flops=int(declared.group(1)) if declared else 0,
          calls=v.times,
          op_name=i.op_name,
        )
        key = dataclasses.astuple(dataclasses.replace(kernel, calls=0))
        calls = found[key].calls if key in found else 0
        found[key] = dataclasses.replace(kernel, calls=calls + v.times)
    return list(found.values())

  def collectives(self) -> list[Collective]:
    """Every collective that runs."""
    frames: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      if v.instruction.root:
        frames[v.computation] += v.times
    return [
      collective
      for computation, times in frames.items()
      for collective in self._collectives_of(computation, times)
    ]

  def _collectives_of(
    self, computation: str, times: int
  ) -> Iterator[Collective]:
    """Those of one computation; one spread over several fusions is one."""
    seen = set()
    for i in self.module.computations[computation].values():
      kind = i.op.removesuffix('-start')
      if kind in COLLECTIVES:
        yield self._collective(computation, i, i.op != kind, times)
      elif i.op in ('fusion', 'async-start') and i.calls:
        for inner_computation, inner in self._fused(i.calls):
          # The start, the steps and the end of one collective each hold it.
          key = (inner.op, inner.channel, _without_layout(inner.type))
          if key not in seen:
            seen.add(key)
            spread = i.op == 'async-start' or 'async' in i.name + i.calls
            yield self._collective(inner_computation, inner, spread, times)

  def _fused(self, computation: str) -> Iterator[tuple[str, Instruction]]:
    for i in self.module.computations[computation].values():
      if i.op.removesuffix('-start') in COLLECTIVES:
        yield computation, i
      elif i.op in ('fusion', 'async-start') and i.calls:
        yield from self._fused(i.calls)

  def _collective(
    self, computation: str, i: Instruction, asynchronous: bool, times: int
  ) -> Collective:
    kind = i.op.removesuffix('-start')
    groups = device_groups(i, self.partitions)
    n = len(groups[0])
    payload = self.module.operand_bytes(computation, i)
    share = (n - 1) / n
    if kind == 'all-gather':
      payload *= n
      wire = payload * share
    elif kind == 'all-reduce' and 'all-reduce-scatter' in computation:
      # An all-reduce fused with the slice that is kept.
      kind, wire = 'reduce-scatter', payload * share
    elif kind == 'all-reduce':
      wire = 2 * payload * share
    elif kind == 'collective-permute':
      wire = float(payload)
    else:
      wire = payload * share
    return Collective(
      kind,
      groups,
      payload,
      wire,
      asynchronous,
      times,
      i.op_name,
      _without_layout(i.type),
    )


def device_groups(
  i: Instruction, partitions: int
) -> tuple[tuple[int, ...], ...]:
  """Which partitions take part in a collective together."""
  text = i.attributes
  if i.op.startswith('collective-permute'):
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', text)
    found = re.findall(r'\{(\d+),(\d+)', pairs.group(1) + '}' if pairs else '')
    return tuple((int(a), int(b)) for a, b in found if a != b) or ((0,),)
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if mesh:
    sizes = {
      k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))
    }
    over = re.findall(r"'([^']+)'", mesh.group(2))
    rest = [name for name in sizes if name not in over]
    ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    names = list(sizes)
    ids = ids.transpose([names.index(name) for name in (*rest, *over)])
    return _rows(ids, math.prod(sizes[name] for name in over))
  iota = re.search(
    r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  )
  if iota:
    shape = [int(n) for n in iota.group(3).split(',')]
    ids = np.arange(math.prod(shape)).reshape(shape)
    if iota.group(4):
      ids = ids.transpose([int(n) for n in iota.group(4).split(',')])
    return _rows(ids, int(iota.group(2)))
  listed = re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', text)
  if listed:
    return tuple(
      tuple(int(n) for n in group.split(','))
      for group in re.findall(r'\{([\d,]+)\}', listed.group(1))
    )
  return (tuple(range(partitions)),)


def mesh_axes(
  groups: tuple[tuple[int, ...], ...], sizes: dict[str, int]
) -> tuple[str, ...]:
  """The mesh axes that a collective's groups run along.

  Args:
    groups: from a `Collective`.
    sizes: the mesh's axes, outermost first.
  """
  shape = tuple(sizes.values())
  moving = set()
  for group in groups:
    places = np.stack(np.unravel_index(np.array(group), shape))
    moving |= set(np.flatnonzero((places != places[:, :1]).any(1)).tolist())
  return tuple(name for k, name in enumerate(sizes) if k in moving)


def _rows(ids: np.ndarray, width: int) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(row) for row in ids.reshape(-1, width).tolist())


def _cycles(visits: list[Visit]) -> int:
  return sum((v.instruction.cycles or 0) * v.times for v in visits)


def _copied(i: Instruction) -> int:
  """Bytes: the smaller end, for a slice is cut from the whole."""
  sizes = [hlo.array_bytes(*array) for array in hlo.arrays(i.type) if array[1]]
  return min(sizes, default=0)


def _without_layout(text: str) -> str:
  return re.sub(r'\{[^{}]*\}', '', text)


def _kernel_name(i: Instruction) -> str:
  found = re.search(r'kernel_name\W+([\w.<>]+)', i.attributes)
  return found.group(1) if found else re.sub(r'[.\d]+$', '', i.name[1:])
