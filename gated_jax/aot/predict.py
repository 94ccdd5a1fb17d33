"""Seconds of a step from a compiled program's figures, part by part.

    step = XLA + kernels + waiting for collectives

XLA is the compiler's cycles over the clock. Unless its own cycles are given, a
kernel counts at the time that its matmuls take on the matrix units or that its
bytes take from and to memory, whichever is more: a floor. A collective counts
by its bytes over the links that its group spans. Synchronous ones are waited
for. One that runs between a start and an end is waited for as long as it
outlasts the instructions between them, one after the other on the links.
Asynchronous ones that are spread over several products are waited for only as
far as they take longer than all the computing. None of this was measured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gated_jax.aot.collectives import Collective
from gated_jax.aot.collectives import collectives_of
from gated_jax.aot.collectives import mesh_axes
from gated_jax.aot.program import KERNEL
from gated_jax.aot.program import Kernel
from gated_jax.aot.program import Program
from gated_jax.chips import Tpu


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind along the same mesh axes."""

  kind: str
  axes: tuple[str, ...]
  asynchronous: bool
  calls: int
  payload: int  # bytes, all calls together
  seconds: float
  exposed: float = 0.0  # seconds of these that are known to be waited for


@dataclasses.dataclass(frozen=True)
class KernelTime:
  """A kernel, and how its time was found."""

  kernel: Kernel
  seconds: float  # all calls together
  bound: str  # 'schedule', 'matrix units' or 'memory'; '': nothing is known


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Seconds of one step, in parts."""

  xla: float
  kernels: tuple[KernelTime, ...]
  traffic: tuple[Traffic, ...]

  @property
  def kernel(self) -> float:
    """Seconds of all kernels."""
    return sum(k.seconds for k in self.kernels)

  @property
  def synchronous(self) -> float:
    """Seconds in which nothing but a collective is under way."""
    return sum(t.exposed for t in self.traffic)

  @property
  def asynchronous(self) -> float:
    """Seconds of collectives that run beside the computing."""
    return sum(t.seconds - t.exposed for t in self.traffic)

  @property
  def total(self) -> float:
    """Seconds of the step."""
    computing = self.xla + self.kernel
    return self.synchronous + max(computing, self.asynchronous)


def _extents(group: list[Any]) -> tuple[list[tuple[int, int]], int]:
  """How a group lies on the torus, and its slices.

  Returns:
    For each direction that it spans: chips from its first to where the next
    group like it begins, and chips from one member to the next.
  """
  coords = np.array([d.coords for d in group])
  extents = []
  for places in coords.T:
    step = int(np.gcd.reduce(places - places[0]))
    if step:
      extents.append((int(np.ptp(places)) + step, step))
  slices = {getattr(d, 'slice_index', 0) or 0 for d in group}
  return extents, len(slices)


def collective_seconds(
  collective: Collective, devices: list[Any], chip: Tpu
) -> float:
  """One run of it over the links that its groups span.

  A ring carries both directions at once; a line half of that. Groups that
  span several directions of the torus use them all, and an all-to-all is
  bound by the bisection of the longest. Where members are not neighbours, as
  many groups share each link as there are steps from one to the next. Between
  slices, each device sends its share of what the slice holds.
  """
  group = [devices[k] for k in collective.groups[0]]
  extents, slices = _extents(group)
  n = len(group)
  if n == 1 or not collective.payload:
    return 0.0
  # On-chip neighbours (v4's two cores) count as one link.
  rates = [
    chip.link * (2 if reach >= chip.ring else 1) / step
    for reach, step in extents
  ] or [chip.link]
  if collective.kind == 'collective-permute':
    return collective.payload / (chip.network if slices > 1 else chip.link)
  if collective.kind in ('all-to-all', 'ragged-all-to-all'):
    within = collective.payload / slices
    crossing = collective.payload - within
    longest = max(
      (
        reach / step / rate
        for (reach, step), rate in zip(extents, rates, strict=False)
      ),
      default=0.0,
    )
    return within * longest / 4 + crossing / chip.network
  # The slices sum up inside first, then exchange shares of that.
  inside = n // slices
  passes = collective.wire / (collective.payload * (n - 1) / n)
  seconds = passes * collective.payload * (inside - 1) / inside / sum(rates)
  if slices > 1:
    share = collective.payload / inside * (slices - 1) / slices
    seconds += passes * share / chip.network
  return seconds


Seconds = Callable[[Collective], float]
Price = Callable[[Kernel], float | None]


def _traffic(
  program: Program, mesh: Any, chip: Tpu, price: Price
) -> tuple[Traffic, ...]:
  devices = list(mesh.devices.flat)
  sizes = dict(mesh.shape)

  def seconds(c: Collective) -> float:
    """One run of a collective."""
    return collective_seconds(c, devices, chip)

  traffic: dict[tuple, Traffic] = {}
  for computation, times in program.frames().items():
    found = list(collectives_of(program.module, computation, times))
    stalls = _stalls(program, computation, found, chip, seconds, price)
    for c in found:
      key = (c.kind, mesh_axes(c.groups, sizes), c.asynchronous)
      old = traffic.get(key, Traffic(*key, calls=0, payload=0, seconds=0.0))
      taken = times * seconds(c)
      waited = times * stalls[c.start] if c.start else 0.0
      traffic[key] = dataclasses.replace(
        old,
        calls=old.calls + times,
        payload=old.payload + times * c.payload,
        seconds=old.seconds + taken,
        exposed=old.exposed + (waited if c.asynchronous else taken),
      )
  return tuple(sorted(traffic.values(), key=lambda t: -t.seconds))


def _stalls(
  program: Program,
  computation: str,
  found: list[Collective],
  chip: Tpu,
  seconds: Seconds,
  price: Price,
) -> dict[str, float]:
  """How long one run of a computation waits for what its starts have begun.

  Args:
    program: of which the computation is a part.
    computation: its name; its instructions stand in the order they run in.
    found: its collectives.
    chip: that it runs on.
    seconds: of one run of a collective.
    price: cycles of one call of a kernel.

  Returns:
    Name of each start to seconds.
  """
  work = {c.start: seconds(c) for c in found if c.start}
  stalls = dict.fromkeys(work, 0.0)
  if not work:
    return stalls
  now = free = 0.0  # on the core that computes, and on the links
  ends: dict[str, float] = {}
  for i in program.module.computations[computation].values():
    if i.name in work:
      free = max(now, free) + work[i.name]
      ends[i.name] = free
    elif i.op.endswith('-done') and i.operands[0] in ends:
      stalls[i.operands[0]] = max(0.0, ends.pop(i.operands[0]) - now)
      now += stalls[i.operands[0]]
    elif i.target == KERNEL:
      kernel = program.kernel(computation, i, 1)
      now += _kernel_time(kernel, chip, price).seconds
    else:
      now += (i.cycles or 0) / chip.clock
  for name, end in ends.items():
    stalls[name] = max(0.0, end - now)
  return stalls


def _kernel_time(kernel: Kernel, chip: Tpu, price: Price) -> KernelTime:
  """A kernel's time by its schedule, or by what it declares."""
  known = price(kernel)
  if known is not None:
    return KernelTime(kernel, kernel.calls * known / chip.clock, 'schedule')
  seconds, bound = max(
    (kernel.flops / chip.matrix_rate, 'matrix units'),
    (kernel.bytes / chip.bandwidth, 'memory'),
  )
  return KernelTime(kernel, kernel.calls * seconds, bound if seconds else '')


def predict(
  program: Program,
  mesh: Any,
  chip: Tpu,
  price: Price = lambda kernel: None,
) -> Prediction:
  """The parts of one step's time.

  Args:
    program: the compiled step.
    mesh: the one it was compiled for.
    chip: what the mesh's devices are.
    price: cycles of one call of a kernel, None where they are not known.
  """

  return Prediction(
    xla=program.cycles / chip.clock,
    kernels=tuple(_kernel_time(k, chip, price) for k in program.kernels()),
    traffic=_traffic(program, mesh, chip, price),
  )
