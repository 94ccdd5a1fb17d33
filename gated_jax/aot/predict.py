"""Seconds of a step from a compiled program's figures, part by part.

    step = XLA + kernels + waiting for collectives

XLA is the compiler's cycles over the clock. A kernel counts at the time its
matmuls would take on the matrix units, a floor, unless its own cycles are
given. A collective counts by its bytes over the links that its group spans.
Synchronous ones are waited for; asynchronous ones only as far as they take
longer than all the computing. None of this was measured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gated_jax.aot.collectives import Collective
from gated_jax.aot.collectives import mesh_axes
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


@dataclasses.dataclass(frozen=True)
class KernelTime:
  """A kernel, and how its time was found."""

  kernel: Kernel
  seconds: float  # all calls together
  scheduled: bool  # True: by its bundles; False: the matrix units' bound


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
    """Seconds spent in collectives that nothing overlaps."""
    return sum(t.seconds for t in self.traffic if not t.asynchronous)

  @property
  def asynchronous(self) -> float:
    """Seconds of collectives that run beside the computing."""
    return sum(t.seconds for t in self.traffic if t.asynchronous)

  @property
  def total(self) -> float:
    """Seconds of the step."""
    computing = self.xla + self.kernel
    return self.synchronous + max(computing, self.asynchronous)


def _extents(group: list[Any]) -> tuple[list[int], int]:
  """Chips that a group spans in each direction, and its slices."""
  coords = np.array([d.coords for d in group])
  spans = (coords.max(0) - coords.min(0) + 1).tolist()
  slices = {getattr(d, 'slice_index', 0) or 0 for d in group}
  return [n for n in spans if n > 1], len(slices)


def collective_seconds(
  collective: Collective, devices: list[Any], chip: Tpu
) -> float:
  """One run of it over the links that its groups span.

  A ring carries both directions at once; a line half of that. Groups that
  span several directions of the torus use them all, and an all-to-all is
  bound by the bisection of the longest. Between slices, each device sends
  its share of what the slice holds.
  """
  group = [devices[k] for k in collective.groups[0]]
  spans, slices = _extents(group)
  n = len(group)
  if n == 1 or not collective.payload:
    return 0.0
  # On-chip neighbours (v4's two cores) count as one link.
  rates = [chip.link * (2 if s >= chip.ring else 1) for s in spans]
  rates = rates or [chip.link]
  if collective.kind == 'collective-permute':
    return collective.payload / (chip.network if slices > 1 else chip.link)
  if collective.kind in ('all-to-all', 'ragged-all-to-all'):
    within = collective.payload / slices
    crossing = collective.payload - within
    longest = max(
      (s / rate for s, rate in zip(spans, rates, strict=False)), default=0.0
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


def _traffic(program: Program, mesh: Any, chip: Tpu) -> tuple[Traffic, ...]:
  devices = list(mesh.devices.flat)
  sizes = dict(mesh.shape)
  traffic: dict[tuple, Traffic] = {}
  for c in program.collectives():
    key = (c.kind, mesh_axes(c.groups, sizes), c.asynchronous)
    old = traffic.get(key, Traffic(*key, calls=0, payload=0, seconds=0.0))
    traffic[key] = dataclasses.replace(
      old,
      calls=old.calls + c.times,
      payload=old.payload + c.times * c.payload,
      seconds=old.seconds + c.times * collective_seconds(c, devices, chip),
    )
  return tuple(sorted(traffic.values(), key=lambda t: -t.seconds))


def predict(
  program: Program,
  mesh: Any,
  chip: Tpu,
  price: Callable[[Kernel], float | None] = lambda kernel: None,
) -> Prediction:
  """The parts of one step's time.

  Args:
    program: the compiled step.
    mesh: the one it was compiled for.
    chip: what the mesh's devices are.
    price: cycles of one call of a kernel, None where they are not known.
  """

  def time(kernel: Kernel) -> KernelTime:
    """A kernel's time by its schedule, or by its FLOPs where none is known."""
    known = price(kernel)
    floor = kernel.flops / chip.flops_per_cycle
    cycles = floor if known is None else known
    seconds = kernel.calls * cycles / chip.clock
    return KernelTime(kernel, seconds, known is not None)

  return Prediction(
    xla=program.cycles / chip.clock,
    kernels=tuple(time(k) for k in program.kernels()),
    traffic=_traffic(program, mesh, chip),
  )
