"""Cycles of attention, forward and backward, by the TPU compiler's schedules.

    python -m gated_jax.aot.attention --target=v5e

Nothing runs: the compiler schedules the kernels, ours and others' (`peers.py`),
and the table says how many cycles the schedules take at least (`schedule.py`,
`counts.py`). These are estimates; waiting for memory is not in them.
`python -m gated_jax.bench attention` times a device that is here.
"""

import argparse
import functools
import importlib.metadata
import pathlib
import sys

from gated_jax import cli
from gated_jax.aot import peers
from gated_jax.aot.attention_kernels import GATES
from gated_jax.aot.attention_kernels import HEADS
from gated_jax.aot.attention_kernels import TARGETS
from gated_jax.aot.attention_kernels import WIDTH
from gated_jax.aot.attention_kernels import Estimates
from gated_jax.aot.attention_kernels import estimate_ours
from gated_jax.aot.attention_kernels import estimate_peer
from gated_jax.aot.dumps import run_with_dumps
from gated_jax.chips import TPUS
from gated_jax.chips import Tpu

MODULE = 'gated_jax.aot.attention'


def print_table(
  kind: str, length: int, gates: list[str], folder: pathlib.Path
) -> None:
  """Prints the table of one length, a line as soon as it is known."""
  chip = TPUS[kind]
  # 2 products forward and 5 backward, over the half that causality leaves.
  square = length * length * WIDTH
  bound = [chip.core.product_cycles(n * square) for n in (2, 5)]
  print(f'\n{kind}, T {length}: thousand cycles of one head')
  print(
    f'{"":<28}{"forward":>11}{"backward":>11}{"both":>11}{"ms":>10}  '
    'of the peer  bundles of the largest stretch'
  )
  show = functools.partial(_show, chip, length)
  show('matrix units full', (bound[0], bound[1]), 0.0, '')
  peer = 0.0
  for name, other in peers.PEERS.items():
    if not other.installed:
      print(f'{name:<28}not installed')
      continue
    line = estimate_peer(kind, name, length, folder)
    peer = min(peer or line.both, line.both)
    show(name, line.cycles, 0.0, _largest_stretches(line))
  for gate in gates:
    line = estimate_ours(kind, gate, length, folder)
    show(line.name, line.cycles, peer, _largest_stretches(line))


def _show(
  chip: Tpu,
  length: int,
  name: str,
  cycles: tuple[float, float],
  peer: float,
  more: str,
) -> None:
  """Prints one line; milliseconds are those of a layer.

  It has 16 heads and at least 16,384 tokens.
  """
  both = sum(cycles)
  heads = HEADS * max(1, 4 * 4096 // length)
  ms = both * heads / chip.cores / chip.clock * 1e3
  ratio = f'{both / peer:.3f}' if peer else ''
  print(
    f'{name:<28}{cycles[0] / 1e3:>11,.1f}{cycles[1] / 1e3:>11,.1f}'
    f'{both / 1e3:>11,.1f}{ms:>10.3f}  {ratio:>11}  {more}',
    flush=True,
  )


def _largest_stretches(line: Estimates) -> str:
  """The stretch with most cycles in either pass.

  Its bundles for each 512 x 512 of the matrix, and the busiest units.
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


def _versions() -> str:
  names = ['jax', 'libtpu']
  if peers.PEERS['splash (tokamax)'].installed:
    names.append('tokamax')
  return ', '.join(
    f'{name} {importlib.metadata.version(name)}' for name in names
  )


def run(arguments: list[str]) -> int:
  """Prints the table."""
  parser = cli.Parser(
    prog=f'python -m {MODULE}',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--target', default='v5e', choices=TARGETS)
  parser.add_argument('--lengths', default='4096')
  parser.add_argument('--gates', default=','.join(GATES))
  parser.add_argument('--dumps', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args(arguments)
  lengths, gates = flags.lengths.split(','), flags.gates.split(',')
  for name in gates:
    if name not in GATES:
      parser.error(f'--gates={name} must be of: {", ".join(GATES)}')
  for length in lengths:
    if not length.isdecimal() or not int(length):
      parser.error(f'--lengths={length} must be numbers of tokens')
  if not flags.dumps:
    return run_with_dumps(MODULE, arguments).returncode
  print("ESTIMATES from the compiler's schedule: no TPU was used.")
  print(_versions())
  for length in lengths:
    print_table(flags.target, int(length), gates, pathlib.Path(flags.dumps))
  return 0


def main(arguments: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  return cli.run(lambda: run(arguments))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
