"""Cycles of attention kernels, ours and other libraries', by their schedules.

A kernel's program is compiled once for many tokens, and its parts are counted
in the program of a small case (`counts.py`); `schedule.py` has the price of
each part.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated_jax.aot import counts
from gated_jax.aot import peers
from gated_jax.aot import schedule
from gated_jax.aot.topology import open_topology
from gated_jax.chips import TPUS
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.pallas_tpu import backend as pallas_tpu
from gated_jax.ops.attention.pallas_tpu.blocks import TABLE
from gated_jax.ops.attention.pallas_tpu.blocks import Blocks
from gated_jax.ops.attention.spec import Attend
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking

# TPUs by name that our kernels have block sizes for.
TARGETS = tuple(TABLE)
GATES = ('none', 'headwise', 'elementwise')
HEADS, KV_HEADS, WIDTH = 16, 8, 128
# The program is compiled for so many tokens that the compiler leaves arrays in
# HBM, as it does in a model. Their number does not change the schedule.
TOKENS = 65_536
# JAX's splash takes minutes to make its tables for longer rows. How often its
# parts run there is extrapolated from shorter rows.
COUNTED = 32_768

# A function of arrays, and their shapes.
Program = tuple[Callable[..., Any], list[tuple[int, ...]]]
Make = Callable[[Case], Program]


def case_of(length: int, gate: str) -> Case:
  """The dense 1.7B model's attention: 16 heads of 128, 8 for keys."""
  return Case(
    B=max(1, 4 * 4096 // length),
    T=length,
    N=HEADS,
    K=KV_HEADS,
    H=WIDTH,
    gate=gate,
    dtype='bfloat16',
  )


def device_of(kind: str) -> Any:
  """One device of a TPU that is not here, to compile for."""
  return open_topology(TPUS[kind].topology)[0]


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
  """Inside, kernels take the block sizes of this device, not of the host."""
  mesh = jax.sharding.Mesh(np.array([device]), ('device',))
  abstract = mesh.abstract_mesh.abstract_device
  empty = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
  with jax.sharding.use_abstract_mesh(empty):
    yield


def gradients(
  attend: Attend, case: Case, masking: Masking = Masking()
) -> Callable[[Inputs, Any], Inputs]:
  """A jitted function of (inputs, gradient of the output) to all gradients."""

  def run(inputs: Inputs, d_output: Any) -> Inputs:
    """The gradients of every input."""

    def output(inputs: Inputs) -> Any:
      """Attention's output alone, which is what backward differentiates."""
      return attend(inputs, masking, case.spec).output

    return jax.vjp(output, inputs)[1](d_output)[0]

  return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class Ours:
  """Our kernels, from arrays [B, T, N H] as projections make them."""

  blocks: Blocks

  def __call__(self, case: Case) -> Program:
    shapes = case.shapes
    attend = functools.partial(pallas_tpu.attend, blocks=self.blocks)
    both = gradients(attend, case)

    def run(d_output: Any, *packed: Any) -> list[Any]:
      """The same on packed arrays, as projections give them."""
      arrays = {
        name: x.reshape(shape)
        for (name, shape), x in zip(shapes.items(), packed, strict=True)
      }
      d_inputs = both(Inputs(**arrays), d_output.reshape(shapes['query']))
      return [d.reshape(*d.shape[:2], -1) for d in d_inputs if d is not None]

    packed_shapes = [(b, t, n * h) for b, t, n, h in shapes.values()]
    return run, [packed_shapes[0], *packed_shapes]


@dataclasses.dataclass(frozen=True)
class Theirs:
  """Kernels of another library, in the layout that they want."""

  peer: peers.Peer
  options: peers.Options

  def __call__(self, case: Case) -> Program:
    run = self.peer.both(case.N, case.T, self.options)
    q, kv = (case.B, case.N, case.T, case.H), (case.B, case.K, case.T, case.H)
    return run, [q, kv, kv, q]


@dataclasses.dataclass(frozen=True)
class Estimates:
  """Figures of one program; cycles are those of one head."""

  name: str
  forward: schedule.Estimate
  backward: schedule.Estimate
  cycles: tuple[float, float]  # forward and backward

  @property
  def both(self) -> float:
    """Cycles of forward and backward together."""
    return sum(self.cycles)


def _abstract(shapes: list[tuple[int, ...]], place: Any) -> list[Any]:
  return [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in shapes
  ]


def compile_kernels(kind: str, make: Make, case: Case) -> None:
  """Compiles the program of a case for a TPU."""
  run, shapes = make(case)
  place = jax.sharding.SingleDeviceSharding(device_of(kind))
  # Whole steps have these, and some of them are about kernels.
  options: dict[str, Any] = dict(TPUS[kind].compiler_options)
  jax.jit(run).lower(*_abstract(shapes, place)).compile(options)


@functools.cache
def _schedules(
  kind: str,
  make: Make,
  case: Case,
  names: tuple[str, ...],
  folder: pathlib.Path,
) -> dict[str, list[list[schedule.Stretch]]]:
  """The schedules that libtpu wrote for each kernel of a program, by name."""
  before = set(folder.iterdir())
  compile_kernels(kind, make, case)
  stretches = {
    name: [
      schedule.read(path, TPUS[kind].core)
      for path in schedule.find(folder, name)
      if path not in before
    ]
    for name in names
  }
  for path in set(folder.iterdir()) - before:
    path.unlink()
  return stretches


def estimate(
  kind: str,
  name: str,
  make: Make,
  cases: tuple[Case, Case],
  folder: pathlib.Path,
) -> Estimates:
  """Cycles of one program's kernels.

  Args:
    kind: name of a TPU.
    name: what the table calls the program.
    make: makes the program of a case.
    cases: one to compile, and one of which heads and steps are counted.
    folder: where libtpu writes.
  """
  compiled, counted = cases
  run, shapes = make(counted)
  kernels = counts.kernels(run, *_abstract(shapes, None))
  names = tuple(dict.fromkeys(k.name for k in kernels))
  schedules = _schedules(kind, make, compiled, names, folder)
  passes: dict[bool, list[schedule.Estimate]] = {True: [], False: []}
  for kernel_name, programs in schedules.items():
    calls = [k for k in kernels if k.name == kernel_name]
    forward = 'forward' in kernel_name or 'fwd' in kernel_name
    passes[forward] += [
      schedule.estimate(stretches, kernel, TPUS[kind].core)
      for stretches, kernel in zip(programs, calls, strict=True)
    ]
  cycles = [
    sum(e.cycles for e in passes[way]) / counted.N for way in (True, False)
  ]
  largest = [max(passes[way], key=lambda e: e.cycles) for way in (True, False)]
  return Estimates(name, largest[0], largest[1], (cycles[0], cycles[1]))


def estimate_ours(
  kind: str, gate: str, length: int, folder: pathlib.Path
) -> Estimates:
  """Our kernels with a gate."""
  case = case_of(length, gate)
  large = dataclasses.replace(case, B=max(1, TOKENS // length))
  cases = (large, dataclasses.replace(case, B=1, N=2, K=1))
  return estimate(kind, f'pallas_tpu {gate}', Ours(TABLE[kind]), cases, folder)


def estimate_peer(
  kind: str, name: str, length: int, folder: pathlib.Path
) -> Estimates:
  """The quickest forward and the quickest backward of all its options.

  A peer is compiled for rows of at most 8192: its blocks are the same at every
  length, and what its backward writes at the longest fits no memory.
  """
  peer = peers.PEERS[name]
  if length > COUNTED:
    lengths = (COUNTED // 4, COUNTED // 2, COUNTED)
    shorter = [estimate_peer(kind, name, n, folder) for n in lengths]
    forward, backward = (
      extrapolate(lengths, [x.cycles[way] for x in shorter], length)
      for way in (0, 1)
    )
    return dataclasses.replace(shorter[-1], cycles=(forward, backward))
  case = dataclasses.replace(case_of(length, 'none'), B=1)
  small = dataclasses.replace(case, N=2, K=1)
  case = dataclasses.replace(case, B=2, T=min(length, 8192))
  # Small blocks waste less of the diagonal, which matters in short rows only.
  options = peer.options if length <= 4096 else peer.options[:1]
  return _quickest(
    [
      estimate(kind, name, Theirs(peer, each), (case, small), folder)
      for each in options
    ]
  )


def extrapolate(
  lengths: tuple[int, ...], cycles: list[float], length: int
) -> float:
  """The parabola through three points: blocks of a triangle, rows, the rest."""
  total = 0.0
  for i, y in enumerate(cycles):
    others = [x for k, x in enumerate(lengths) if k != i]
    for x in others:
      y *= (length - x) / (lengths[i] - x)
    total += y
  return total


def _quickest(programs: list[Estimates]) -> Estimates:
  """The quickest forward and the quickest backward, as if of one program."""
  forward = min(programs, key=lambda x: x.cycles[0])
  backward = min(programs, key=lambda x: x.cycles[1])
  return Estimates(
    forward.name,
    forward.forward,
    backward.backward,
    (forward.cycles[0], backward.cycles[1]),
  )
