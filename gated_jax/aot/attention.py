"""What attention costs, forward and backward: estimated, or timed.

    python -m gated_jax.aot.attention --target=tpu:v5e
    python -m gated_jax.aot.attention --target=device

With a TPU by name nothing runs: its compiler schedules the kernels, ours and
others' (`peers.py`), and the table says how many cycles the schedules take at
least (`schedule.py`, `counts.py`). These are estimates; waiting for memory is
not in them. `device` times whatever is there.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gated_jax.aot import counts
from gated_jax.aot import peers
from gated_jax.aot import schedule
from gated_jax.aot.topology import QUIET
from gated_jax.chips import TPUS
from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention.api import gated_dot_product_attention
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking

# The TPUs that our kernels have block sizes for.
TARGETS = tuple(
  name for name, tpu in TPUS.items() if tpu.attention_blocks is not None
)
GATES = ('none', 'headwise', 'elementwise')
# The program is compiled for many tokens, so that the compiler leaves arrays
# in HBM, where a model has them; their number does not change the schedule.
TOKENS = 65_536
HEADS, KV_HEADS, WIDTH = 16, 8, 128
# JAX's splash takes minutes to make its tables for longer rows. How often its
# parts run follows from shorter ones.
COUNTED = 32_768


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


def gradients(case: Case, backend: str, masking: Masking = Masking()):
  """A function of (arrays, gradient of the output) to all gradients."""

  def run(arrays, d_output):
    def attend(arrays):
      return gated_dot_product_attention(
        *Inputs(**arrays),
        masking=masking,
        spec=case.spec,
        implementation=backend,
      ).output

    return jax.vjp(attend, arrays)[1](d_output)[0]

  return jax.jit(run)


def compile_for(kind: str, gate: str, length: int) -> None:
  """Compiles our kernels for a TPU by name, forward and backward."""
  use_blocks_of(kind)
  case = case_of(length, gate)
  run, shapes = ours(case)
  jax.jit(run).lower(*_abstract(shapes, place_of(kind))).compile()


def use_blocks_of(kind: str) -> None:
  """The host is no TPU, so the table's row for it becomes the target's."""
  cut.TABLE[''] = cut.TABLE[kind]


def place_of(kind: str) -> jax.sharding.Sharding:
  """One device of a TPU that is not here, to compile for."""
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TPUS[kind].topology
  )
  return jax.sharding.SingleDeviceSharding(topology.devices[0])


def _abstract(shapes: list[tuple[int, ...]], place: Any) -> list[Any]:
  return [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in shapes
  ]


def ours(case: Case) -> tuple[Callable, list[tuple[int, ...]]]:
  """All gradients, of arrays [B, T, N H] as projections make them."""
  shapes = case.shapes
  both = gradients(case, 'pallas_tpu')

  def run(d_output, *flat):
    arrays = {
      name: x.reshape(shape)
      for (name, shape), x in zip(shapes.items(), flat, strict=True)
    }
    found = both(arrays, d_output.reshape(shapes['query']))
    return [d.reshape(*d.shape[:2], -1) for d in found.values()]

  flat = [(b, t, n * h) for b, t, n, h in shapes.values()]
  return run, [flat[0], *flat]


@dataclasses.dataclass(frozen=True)
class Theirs:
  """The same of a peer, in the layout that it wants."""

  peer: peers.Peer
  options: peers.Options

  def __call__(self, case: Case) -> tuple[Callable, list[tuple[int, ...]]]:
    run = self.peer.both(case.N, case.T, self.options)
    q, kv = (case.B, case.N, case.T, case.H), (case.B, case.K, case.T, case.H)
    return run, [q, kv, kv, q]


@dataclasses.dataclass(frozen=True)
class Line:
  """One program's figures; cycles are of one head."""

  name: str
  forward: schedule.Estimate
  backward: schedule.Estimate
  cycles: tuple[float, float]

  @property
  def both(self) -> float:
    return sum(self.cycles)


Make = Callable[[Case], tuple[Callable, list[tuple[int, ...]]]]


@functools.cache
def _schedules(
  kind: str,
  make: Make,
  case: Case,
  names: tuple[str, ...],
  folder: pathlib.Path,
) -> dict[str, list[list[schedule.Stretch]]]:
  """What libtpu wrote of each kernel of one program, by its name."""
  before = set(folder.iterdir())
  run, shapes = make(case)
  jax.jit(run).lower(*_abstract(shapes, place_of(kind))).compile()
  found = {
    name: [
      schedule.read(path, TPUS[kind].core)
      for path in schedule.find(folder, name)
      if path not in before
    ]
    for name in names
  }
  for path in set(folder.iterdir()) - before:
    path.unlink()
  return found


def schedule_of(
  kind: str,
  name: str,
  make: Make,
  cases: tuple[Case, Case],
  folder: pathlib.Path,
) -> Line:
  """Cycles of one program's kernels.

  Args:
    kind: of TPU.
    name: for the table.
    make: what makes the program of a case.
    cases: one to compile, and one of which heads and steps are counted.
    folder: where libtpu writes.
  """
  compiled, counted = cases
  run, shapes = make(counted)
  kernels = counts.kernels(run, *_abstract(shapes, None))
  names = tuple(dict.fromkeys(k.name for k in kernels))
  schedules = _schedules(kind, make, compiled, names, folder)
  found: dict[bool, list[schedule.Estimate]] = {True: [], False: []}
  for kernel_name, stretches in schedules.items():
    alike = [k for k in kernels if k.name == kernel_name]
    forward = 'forward' in kernel_name or 'fwd' in kernel_name
    found[forward] += [
      schedule.estimate(each, kernel, TPUS[kind].core)
      for each, kernel in zip(stretches, alike, strict=True)
    ]
  cycles = [
    sum(e.cycles for e in found[way]) / counted.N for way in (True, False)
  ]
  most = [max(found[way], key=lambda e: e.cycles) for way in (True, False)]
  return Line(name, most[0], most[1], (cycles[0], cycles[1]))


def kernels_of_ours(
  kind: str, gate: str, length: int, folder: pathlib.Path
) -> Line:
  """Our kernels with a gate."""
  case = case_of(length, gate)
  large = dataclasses.replace(case, B=max(1, TOKENS // length))
  cases = (large, dataclasses.replace(case, B=1, N=2, K=1))
  return schedule_of(kind, f'pallas_tpu {gate}', ours, cases, folder)


def kernels_of_peer(
  kind: str, name: str, length: int, folder: pathlib.Path
) -> Line:
  """The quickest forward and the quickest backward of all its options.

  Their blocks are the same at every length, and what backward writes at the
  longest would not fit any memory: it is compiled for at most 8192.
  """
  peer = peers.PEERS[name]
  if length > COUNTED:
    lengths = (COUNTED // 4, COUNTED // 2, COUNTED)
    lines = [kernels_of_peer(kind, name, n, folder) for n in lengths]
    forward, backward = (
      _extrapolate(lengths, [x.cycles[way] for x in lines], length)
      for way in (0, 1)
    )
    return dataclasses.replace(lines[-1], cycles=(forward, backward))
  case = dataclasses.replace(case_of(length, 'none'), B=1)
  small = dataclasses.replace(case, N=2, K=1)
  case = dataclasses.replace(case, B=2, T=min(length, 8192))
  # Small blocks waste less of the diagonal, which is nothing in the end.
  options = peer.options if length <= 4096 else peer.options[:1]
  lines = [
    schedule_of(kind, name, Theirs(peer, each), (case, small), folder)
    for each in options
  ]
  return _best(lines, name)


def _extrapolate(
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


def _best(lines: list[Line], name: str) -> Line:
  """The quickest forward and the quickest backward, as of one program."""
  forward = min(lines, key=lambda x: x.cycles[0])
  backward = min(lines, key=lambda x: x.cycles[1])
  return Line(
    name,
    forward.forward,
    backward.backward,
    (forward.cycles[0], backward.cycles[1]),
  )


def estimate(
  kind: str, length: int, gates: list[str], folder: pathlib.Path
) -> None:
  """Prints the table of one length, a line as soon as it is known."""
  chip = TPUS[kind]
  use_blocks_of(kind)
  # 2 products forward and 5 backward, of the half that causality leaves.
  bound = [
    chip.core.product_cycles(n * length * length * WIDTH) for n in (2, 5)
  ]
  print(f'\n{kind}, T {length}: thousand cycles of one head')
  print(
    f'{"":<28}{"forward":>11}{"backward":>11}{"both":>11}{"ms":>10}  '
    'of the peer  bundles of the largest stretch'
  )
  show = functools.partial(_show, chip, length)
  show('matrix units full', bound, 0.0, '')
  peer = 0.0
  for name, other in peers.PEERS.items():
    if not other.installed:
      print(f'{name:<28}not installed')
      continue
    line = kernels_of_peer(kind, name, length, folder)
    peer = min(peer or line.both, line.both)
    show(name, line.cycles, 0.0, _main(line))
  for gate in gates:
    line = kernels_of_ours(kind, gate, length, folder)
    show(line.name, line.cycles, peer, _main(line))


def _show(chip, length, name, cycles, peer, more):
  both = sum(cycles)
  # Of a layer of 16 heads and at least 16,384 tokens.
  ms = both * HEADS * max(1, 4 * 4096 // length) / chip.cores / chip.clock * 1e3
  ratio = f'{both / peer:.3f}' if peer else ''
  print(
    f'{name:<28}{cycles[0] / 1e3:>11,.1f}{cycles[1] / 1e3:>11,.1f}'
    f'{both / 1e3:>11,.1f}{ms:>10.3f}  {ratio:>11}  {more}',
    flush=True,
  )


def _main(line: Line) -> str:
  """The stretch with most cycles: its bundles for 512 x 512 of the matrix,

  and the units it keeps busiest.
  """
  texts = []
  for products, e in ((2, line.forward), (5, line.backward)):
    tiles = e.flops / (2 * products * WIDTH * 512 * 512)
    use = {k: v for k, v in e.most.use.items() if ':' not in k and k != 'MXU'}
    second = max(use, key=lambda k: use[k], default='')
    more = f', {second} {use[second]:.0%}' if second else ''
    busy = e.most.products / e.most.cycles
    texts.append(
      f'{e.most.bundles / tiles:,.0f} (matrix units {busy:.0%}{more})'
    )
  return ' / '.join(texts)


def measure(length: int, gates: list[str], repeats: int = 10) -> list[str]:
  """Times of what this device can do, milliseconds forward and backward.

  The median, and how far the fastest and the slowest are apart.
  """
  lines = [f'T {length}, {jax.devices()[0].device_kind}']
  for backend in ('xla', 'cudnn', 'splash', 'pallas_tpu'):
    for gate in gates:
      case = case_of(length, gate)
      arrays = case.arrays()
      try:
        run = gradients(case, backend).lower(arrays, arrays['query']).compile()
        jax.block_until_ready(run(arrays, arrays['query']))
      except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
        lines.append(f'{backend:<12}{gate:<13}{str(e).splitlines()[0][:60]}')
        continue
      times = []
      for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(arrays, arrays['query']))
        times.append((time.perf_counter() - start) * 1e3)
      ms, spread = statistics.median(times), max(times) - min(times)
      lines.append(f'{backend:<12}{gate:<13}{ms:8.2f} ms, spread {spread:.2f}')
  return lines


def apart(module: str, arguments: list[str], **more: Any) -> Any:
  """A completed process of its own: libtpu reads its flags once."""
  with tempfile.TemporaryDirectory() as folder:
    flags = schedule.FLAGS.format(folder=folder)
    return subprocess.run(
      [sys.executable, '-m', module, *arguments, f'--dumps={folder}'],
      env={
        **os.environ,
        **QUIET,
        'JAX_PLATFORMS': 'cpu',
        'LIBTPU_INIT_ARGS': flags,
      },
      check=False,
      **more,
    )


def main(arguments: list[str]) -> int:
  """Prints the table; 2 for a flag that means nothing."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--target', default='device')
  parser.add_argument('--lengths', default='4096')
  parser.add_argument('--gates', default=','.join(GATES))
  parser.add_argument('--dumps', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args(arguments)
  platform, _, kind = flags.target.partition(':')
  lengths, gates = flags.lengths.split(','), flags.gates.split(',')
  for name in gates:
    if name not in GATES:
      parser.error(f'--gates={name} must be of: {", ".join(GATES)}')
  for length in lengths:
    if not length.isdecimal() or not int(length):
      parser.error(f'--lengths={length} must be numbers of tokens')
  if flags.target == 'device':
    for length in lengths:
      print('\n'.join(measure(int(length), gates)), flush=True)
    return 0
  if platform != 'tpu' or kind not in TARGETS:
    known = ', '.join(f'tpu:{k}' for k in TARGETS)
    print(f'--target={flags.target} must be device, {known}', file=sys.stderr)
    return 2
  if not flags.dumps:
    return apart('gated_jax.aot.attention', arguments).returncode
  versions = {
    name: importlib.metadata.version(name)
    for name in ('jax', 'libtpu', 'tokamax')
    if name != 'tokamax' or peers.PEERS['splash (tokamax)'].installed
  }
  print("ESTIMATES from the compiler's schedule: no TPU was used.")
  print(', '.join(f'{name} {version}' for name, version in versions.items()))
  for length in lengths:
    estimate(kind, int(length), gates, pathlib.Path(flags.dumps))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
