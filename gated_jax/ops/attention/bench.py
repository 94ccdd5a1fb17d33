"""What attention costs, forward and backward: estimated, or timed.

    python -m gated_jax.ops.attention.bench --target=tpu:v5e
    python -m gated_jax.ops.attention.bench --target=device

With a TPU by name nothing runs: its compiler schedules the kernels, and the
table says how many cycles the schedule takes at least (`schedule.py`). These
are estimates; waiting for memory is not in them. `device` times whatever is
there.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental import topologies

from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention import schedule
from gated_jax.ops.attention.api import gated_dot_product_attention
from gated_jax.ops.attention.cases import Case

KINDS = {'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite'}
# A backend, and the gates it is shown with. Splash's gate is XLA's, outside.
ROWS = {
  'splash': ('none',),
  'pallas_tpu': ('none', 'headwise', 'elementwise'),
}
NAMES = {
  'splash': ('splash_mha_fwd', 'splash_mha_dkv'),
  'pallas_tpu': ('gated_attention_forward', 'gated_attention_backward'),
}
# Shorter stretches belong to the grid's own bookkeeping, once a step.
SHORT = 200


def case_of(length: int, gate: str) -> Case:
  """The dense 1.7B model's attention: 16 heads of 128, 8 for keys."""
  rows = max(1, 4 * 4096 // length)
  return Case(B=rows, T=length, N=16, K=8, H=128, gate=gate, dtype='bfloat16')


def gradients(case: Case, backend: str):
  """A function of (arrays, gradient of the output) to all gradients."""

  def run(arrays, d_output):
    def attend(arrays):
      return gated_dot_product_attention(
        **arrays, spec=case.spec, implementation=backend
      ).output

    return jax.vjp(attend, arrays)[1](d_output)[0]

  return jax.jit(run)


def compile_for(kind: str, backend: str, gate: str, length: int) -> None:
  """Compiles one row; libtpu writes its schedules where it was told to."""
  device = topologies.get_topology_desc(
    platform='tpu', topology_name=schedule.CORES[kind].topology
  ).devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  # The host is no TPU, so the table's row for it becomes the target's.
  cut.TABLE[''] = cut.TABLE[KINDS[kind]]
  case = case_of(length, gate)
  arrays = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    for name, x in case.abstract().items()
  }
  gradients(case, backend).lower(arrays, arrays['query']).compile()


def times(backend: str, forward: bool, length: int, blocks: cut.Blocks):
  """How often (its loop, its largest stretch, others, a step) run, per head.

  For causal attention, and for kernels whose programs are one stretch for
  the diagonal (splash: for every block) and, ours, a loop for the rest.
  """
  if backend == 'splash':
    n = length // 1024
    return 0, n * (n + 1) / 2, n, n * n
  blocks = blocks.fit(length, length)
  parts = max(1, length // blocks.resident)
  if forward:
    n, step = length // blocks.queries, blocks.queries // blocks.keys
    return step * n * (n - 1) / 2, n, n, n * parts
  n, step = length // blocks.back_keys, blocks.back_keys // blocks.back_queries
  return step * n * (n - 1) / 2, n, parts, n + parts * (parts + 1) / 2


def cycles(
  stretches: list[schedule.Stretch], runs: tuple[float, ...], prologue: float
) -> float:
  """Stretches times how often each runs."""
  loop, most, other, step = runs
  total = 0.0
  for s in stretches:
    if s.products > 100:
      total += s.cycles * (loop if s.loop else most)
    elif s.loop:
      total += s.cycles * prologue
    else:
      total += s.cycles * (other if s.bundles >= SHORT else step)
  return total


def estimate(kind: str, length: int) -> list[str]:
  """The table's lines for one length."""
  core = schedule.CORES[kind]
  bound = 7 * length * length / 2 / 1024 / 128 * core.square
  lines = [f'T {length}, cycles per head; matrix units full: {bound:,.0f}']
  # Of a layer of 16 heads and 16,384 tokens.
  heads = 16 * max(1, 4 * 4096 // length) / core.cores
  for backend, gates in ROWS.items():
    for gate in gates:
      found = []
      with tempfile.TemporaryDirectory() as folder:
        _compile_apart(kind, backend, gate, length, folder)
        for forward, name in zip((True, False), NAMES[backend], strict=True):
          path = schedule.find(pathlib.Path(folder), name)
          if path is None:
            break
          blocks = cut.TABLE[KINDS[kind]]
          runs = times(backend, forward, length, blocks)
          parts = max(1, length // blocks.back_resident)
          prologue = length / blocks.back_queries * (parts - 1) / 2
          stretches = schedule.read(path, core)
          found.append(cycles(stretches, runs, prologue))
      if len(found) < 2:
        lines.append(f'{backend:<12}{gate:<13}other kernels at this length')
        continue
      ms = sum(found) * heads / core.clock * 1e3
      lines.append(
        f'{backend:<12}{gate:<13}forward {found[0]:>12,.0f}  backward '
        f'{found[1]:>12,.0f}  both {sum(found):>12,.0f}  {ms:8.2f} ms'
      )
  return lines


def _compile_apart(kind, backend, gate, length, folder):
  """In a process of its own: libtpu reads its flags once."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'LIBTPU_INIT_ARGS': schedule.FLAGS.format(folder=folder),
  }
  row = f'{kind},{backend},{gate},{length}'
  command = [sys.executable, '-m', 'gated_jax.ops.attention.bench']
  done = subprocess.run(
    [*command, f'--compile={row}'],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f'{row} does not compile:\n{done.stderr[-2000:]}')


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


def main() -> int:
  """Prints the table; 2 for a flag that means nothing."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--target', default='device')
  parser.add_argument('--lengths', default='4096')
  parser.add_argument('--compile', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.compile:
    kind, backend, gate, length = flags.compile.split(',')
    compile_for(kind, backend, gate, int(length))
    return 0
  platform, _, kind = flags.target.partition(':')
  if flags.target != 'device' and (platform != 'tpu' or kind not in KINDS):
    known = ', '.join(f'tpu:{k}' for k in KINDS)
    print(f'--target={flags.target} must be device, {known}', file=sys.stderr)
    return 2
  if kind:
    print("ESTIMATES from the compiler's schedule: no TPU was used.")
  for length in map(int, flags.lengths.split(',')):
    lines = estimate(kind, length) if kind else measure(length)
    print('\n'.join(lines), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
