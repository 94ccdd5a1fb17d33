"""What attention costs, forward and backward: estimated, or timed.

    python -m gated_jax.ops.attention.bench --target=tpu:v5e
    python -m gated_jax.ops.attention.bench --target=device

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gated_jax.ops.attention import counts
from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention import peers
from gated_jax.ops.attention import schedule
from gated_jax.ops.attention.api import gated_dot_product_attention
from gated_jax.ops.attention.cases import Case

KINDS = {'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite'}
GATES = ('none', 'headwise', 'elementwise')
# What libtpu reads when it is loaded: not to ask the cloud who it is, and
# not to say at length that nobody answered.
QUIET = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}
# The program is compiled for many tokens, so that the compiler leaves arrays
# in HBM, where a model has them; their number does not change the schedule.
TOKENS = 65_536
HEADS, KV_HEADS, WIDTH = 16, 8, 128


def case_of(length: int, gate: str, tokens: int = 4 * 4096) -> Case:
  """The dense 1.7B model's attention: 16 heads of 128, 8 for keys."""
  return Case(
    B=max(1, tokens // length),
    T=length,
    N=HEADS,
    K=KV_HEADS,
    H=WIDTH,
    gate=gate,
    dtype='bfloat16',
  )


def gradients(case: Case, backend: str):
  """A function of (arrays, gradient of the output) to all gradients."""

  def run(arrays, d_output):
    def attend(arrays):
      return gated_dot_product_attention(
        **arrays, spec=case.spec, implementation=backend
      ).output

    return jax.vjp(attend, arrays)[1](d_output)[0]

  return jax.jit(run)


def compile_for(kind: str, gate: str, length: int) -> None:
  """Compiles our kernels for a TPU by name, forward and backward."""
  use_blocks_of(kind)
  case = case_of(length, gate)
  run, shapes = ours(case)
  jax.jit(run).lower(*_abstract(shapes, _place(kind))).compile()


def use_blocks_of(kind: str) -> None:
  """The host is no TPU, so the table's row for it becomes the target's."""
  cut.TABLE[''] = cut.TABLE[KINDS[kind]]


def _place(kind: str) -> jax.sharding.Sharding:
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=schedule.CORES[kind].topology
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


def theirs(case: Case, peer: peers.Peer, options: peers.Options):
  run = peer.both(case.N, case.T, options)
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


def schedule_of(
  kind: str, name: str, make: Make, gate: str, length: int, folder: pathlib.Path
) -> Line:
  """Compiles one program and counts its kernels' cycles."""
  core = schedule.CORES[kind]
  before = set(folder.iterdir())
  run, shapes = make(case_of(length, gate, TOKENS))
  jax.jit(run).lower(*_abstract(shapes, _place(kind))).compile()
  # Heads are alike, so two of them are counted.
  small = dataclasses.replace(case_of(length, gate), B=1, N=2, K=1)
  run, shapes = make(small)
  found: dict[bool, list[schedule.Estimate]] = {True: [], False: []}
  kernels = counts.kernels(run, *_abstract(shapes, None))
  for kernel_name in dict.fromkeys(k.name for k in kernels):
    alike = [k for k in kernels if k.name == kernel_name]
    paths = [p for p in schedule.find(folder, kernel_name) if p not in before]
    forward = 'forward' in kernel_name or 'fwd' in kernel_name
    for path, kernel in zip(paths, alike, strict=True):
      stretches = schedule.read(path, core)
      found[forward].append(schedule.estimate(stretches, kernel, core))
  for path in set(folder.iterdir()) - before:
    path.unlink()
  cycles = [
    sum(e.cycles for e in found[way]) / small.N for way in (True, False)
  ]
  most = [max(found[way], key=lambda e: e.cycles) for way in (True, False)]
  return Line(name, most[0], most[1], (cycles[0], cycles[1]))


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
  core = schedule.CORES[kind]
  use_blocks_of(kind)
  # 2 products forward and 5 backward, of the half that causality leaves.
  bound = [core.products(n * length * length * WIDTH) for n in (2, 5)]
  print(f'\n{kind}, T {length}: thousand cycles of one head')
  print(
    f'{"":<28}{"forward":>9}{"backward":>9}{"both":>9}{"ms":>9}  '
    'of the peer  bundles of the main loop'
  )
  show = functools.partial(_show, core, length)
  show('matrix units full', bound, 0.0, '')
  peer = 0.0
  for name, other in peers.PEERS.items():
    if not other.installed:
      print(f'{name:<28}not installed')
      continue
    lines = []
    # Small blocks waste less of the diagonal, which is nothing in the end.
    for options in other.options if length <= 4096 else other.options[:1]:
      make = functools.partial(theirs, peer=other, options=options)
      lines.append(schedule_of(kind, name, make, 'none', length, folder))
    line = _best(lines, name)
    peer = min(peer or line.both, line.both)
    show(name, line.cycles, 0.0, _main(line))
  for gate in gates:
    line = schedule_of(kind, gate, ours, gate, length, folder)
    show(f'pallas_tpu {gate}', line.cycles, peer, _main(line))


def _show(core, length, name, cycles, peer, more):
  both = sum(cycles)
  # Of a layer of 16 heads and at least 16,384 tokens.
  ms = both * HEADS * max(1, 4 * 4096 // length) / core.cores / core.clock * 1e3
  ratio = f'{both / peer:.3f}' if peer else ''
  print(
    f'{name:<28}{cycles[0] / 1e3:>9,.1f}{cycles[1] / 1e3:>9,.1f}'
    f'{both / 1e3:>9,.1f}{ms:>9.3f}  {ratio:>11}  {more}',
    flush=True,
  )


def _main(line: Line) -> str:
  """The stretch with most cycles: its bundles for 512 x 512 of the matrix."""
  texts = []
  for products, e in ((2, line.forward), (5, line.backward)):
    tiles = e.flops / (2 * products * WIDTH * 512 * 512)
    most = sorted(e.most.use.items(), key=lambda x: -x[1])
    busy = e.most.products / e.most.cycles
    second = next((x for x in most if ':' not in x[0] and x[0] != 'MXU'), None)
    more = f', {second[0]} {second[1]:.0%}' if second else ''
    texts.append(
      f'{e.most.bundles / tiles:,.0f} (matrix units {busy:.0%}{more})'
    )
  return ' / '.join(texts)


def measure(length: int, repeats: int = 10) -> list[str]:
  """Times of what this device can do, milliseconds forward and backward."""
  lines = [f'T {length}, {jax.devices()[0].device_kind}']
  for backend in ('xla', 'cudnn', 'splash', 'pallas_tpu'):
    for gate in ('none', 'headwise', 'elementwise'):
      case = case_of(length, gate)
      arrays = case.arrays()
      try:
        run = gradients(case, backend).lower(arrays, arrays['query']).compile()
        jax.block_until_ready(run(arrays, arrays['query']))
      except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as e:
        lines.append(f'{backend:<12}{gate:<13}{str(e).splitlines()[0][:60]}')
        continue
      start = time.perf_counter()
      for _ in range(repeats):
        result = run(arrays, arrays['query'])
      jax.block_until_ready(result)
      ms = (time.perf_counter() - start) / repeats * 1e3
      lines.append(f'{backend:<12}{gate:<13}{ms:8.2f} ms')
  return lines


def _apart(arguments: list[str]) -> int:
  """In a process of its own: libtpu reads its flags once."""
  with tempfile.TemporaryDirectory() as folder:
    flags = schedule.FLAGS.format(folder=folder)
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'gated_jax.ops.attention.bench',
        *arguments,
        f'--dumps={folder}',
      ],
      env={**os.environ, **QUIET, 'LIBTPU_INIT_ARGS': flags},
      check=False,
    ).returncode


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
  if flags.target == 'device':
    for length in lengths:
      print('\n'.join(measure(int(length))), flush=True)
    return 0
  if platform != 'tpu' or kind not in KINDS:
    known = ', '.join(f'tpu:{k}' for k in KINDS)
    print(f'--target={flags.target} must be device, {known}', file=sys.stderr)
    return 2
  if not flags.dumps:
    return _apart(arguments)
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
