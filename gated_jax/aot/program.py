"""One run of a compiled program: its cycles, FLOPs, bytes and kernels.

The control flow is walked from the entry: a loop's body counts as often as
it runs, of a conditional the costliest branch counts, and a fusion is a leaf
whose own estimate covers what is in it. The walk yields one `Visit` for each
instruction reached; everything else here is a sum over visits.

The text has no estimate for Pallas kernels, collectives, asynchronous
copies, sorts and most gathers; they are counted and sized instead. All
figures are per device, and estimates: nothing was run.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from gated_jax.aot import hlo
from gated_jax.aot.collectives import COLLECTIVES
from gated_jax.aot.collectives import Collective
from gated_jax.aot.collectives import collectives_of
from gated_jax.aot.hlo import Instruction
from gated_jax.aot.loops import Loops
from gated_jax.aot.loops import Scope
from gated_jax.ops.moe.exchange import FURTHER_ROUNDS

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
  """A loop that runs, in all, `times` times `trips`.

  Where the trips depend on data they are taken to be one; none for the rounds
  that experts add where their load is uneven.
  """

  name: str
  op_name: str
  trips: int
  known: bool
  times: int
  cycles: int  # those of one trip


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Pallas calls of one name on operands of one shape."""

  name: str
  operands: tuple[str, ...]
  output: str
  flops: int  # declared by its author; 0: nothing declared
  bytes: int  # read and written, the same
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
        yield from self._costliest(scope, i, times)
      elif i.op == 'call':
        yield from self._walk(Scope(i.attribute('to_apply'), scope), times)
      elif i.op == 'async-start' and not self._communicates(i.calls):
        yield from self._walk(Scope(i.calls, scope), times)

  def _walk_loop(
    self, scope: Scope, loop: Instruction, times: int
  ) -> Iterator[Visit]:
    trips = self._loops.trips(scope, loop)
    known = trips is not None
    if trips is None:
      trips = 0 if FURTHER_ROUNDS in loop.op_name else 1
    total = times * trips
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
        trips,
        known,
        times,
        cycles,
      )
    )
    yield from visits

  def _costliest(
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

    def cost(branch: tuple[list[Visit], list[Loop]]) -> tuple[int, int]:
      """The cost of a branch: cycles first, then FLOPs."""
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
    """Devices that the program is split over."""
    return self.module.partitions

  @property
  def cycles(self) -> int:
    """The sum of all estimates."""
    return _cycles(self.visits)

  @property
  def flops(self) -> int:
    """FLOPs of matmuls outside Pallas kernels."""
    return sum(self._matmul[v.instruction] * v.times for v in self.visits)

  def cycles_by_kind(self) -> dict[str, int]:
    """Keys: matmul, data movement, elementwise."""
    cycles: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      i = v.instruction
      if self._matmul[i]:
        kind = 'matmul'
      elif i.op in ('copy', 'transpose') or _MOVES.match(i.name):
        kind = 'data movement'
      else:
        kind = 'elementwise'
      cycles[kind] += (i.cycles or 0) * v.times
    return dict(cycles)

  def cycles_by_phase(self) -> dict[str, int]:
    """Keys: forward, backward, recomputation, other."""
    cycles: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      i = v.instruction
      cycles[phase(i.op_name)] += (i.cycles or 0) * v.times
    return {name: total for name, total in cycles.items() if total}

  def costliest(self, count: int) -> list[tuple[int, Visit]]:
    """The instructions with the most cycles, all their runs together."""
    costs = [((v.instruction.cycles or 0) * v.times, v) for v in self.visits]
    return sorted(costs, key=lambda pair: -pair[0])[:count]

  def copied_bytes(self) -> int:
    """Bytes that asynchronous copies move between memories of one device."""
    return sum(
      v.times * _copied(v.instruction)
      for v in self.visits
      if v.instruction.op in _COPIES
    )

  def without_estimate(self) -> dict[str, int]:
    """Runs of operations with a cost that no estimate covers, by op."""
    counts: collections.Counter[str] = collections.Counter()
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
        counts[i.target or re.sub(r'[.\d]+$', '', i.name[1:])] += v.times
    return dict(counts)

  def kernel(self, computation: str, i: Instruction, calls: int) -> Kernel:
    """The kernel that an instruction of a computation calls."""
    types = self.module.operand_types(computation, i)

    def declared(name: str) -> int:
      """A figure that the kernel's author gives."""
      figure = re.search(rf'"{name}":"?(\d+)', i.attributes)
      return int(figure.group(1)) if figure else 0

    return Kernel(
      name=_kernel_name(i),
      operands=tuple(hlo.without_layout(t) for t in types),
      output=hlo.without_layout(i.type),
      flops=declared('flops'),
      bytes=declared('bytes_accessed'),
      calls=calls,
      op_name=i.op_name,
    )

  def kernels(self) -> list[Kernel]:
    """Pallas kernels, equal calls together."""
    kernels: dict[tuple, Kernel] = {}
    for v in self.visits:
      i = v.instruction
      if i.target == KERNEL and v.times:
        kernel = self.kernel(v.computation, i, v.times)
        key = dataclasses.astuple(dataclasses.replace(kernel, calls=0))
        calls = kernels[key].calls if key in kernels else 0
        kernels[key] = dataclasses.replace(kernel, calls=calls + v.times)
    return list(kernels.values())

  def frames(self) -> dict[str, int]:
    """The computations that control reaches, and how often each runs."""
    frames: collections.Counter[str] = collections.Counter()
    for v in self.visits:
      if v.instruction.root and v.times:
        frames[v.computation] += v.times
    return dict(frames)

  def collectives(self) -> list[Collective]:
    """Every collective that runs."""
    return [
      collective
      for computation, times in self.frames().items()
      for collective in collectives_of(self.module, computation, times)
    ]


def _cycles(visits: list[Visit]) -> int:
  return sum((v.instruction.cycles or 0) * v.times for v in visits)


def _copied(i: Instruction) -> int:
  """Bytes: the smaller end, for a slice is cut from the whole."""
  sizes = [hlo.array_bytes(*array) for array in hlo.arrays(i.type) if array[1]]
  return min(sizes, default=0)


def _kernel_name(i: Instruction) -> str:
  match = re.search(r'kernel_name\W+([\w.<>]+)', i.attributes)
  return match.group(1) if match else re.sub(r'[.\d]+$', '', i.name[1:])
