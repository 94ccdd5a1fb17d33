"""Speed of attention and of the train step on this device.

    python -m gated_jax.bench attention --shapes=4k,16k --backends=cudnn,xla
    python -m gated_jax.bench step --model=400m --batch=8
    python -m gated_jax.bench peer --model=1b7 --batch=4 --repeats=2
    python -m gated_jax.bench data
    python -m gated_jax.bench families

`attention` compares gates on each backend; `step` whole updates, by gate;
`profile` says which kernels an update spends its time in; `peer` compares one
workload with the same in PyTorch, in processes that take turns, for neither
can have the device's memory while the other does; `data` is how fast batches
are made on the host; `families` has tokens a second of a small model of every
family of released models, decoding and in training. Every line of JSON is one
measurement; the table at the end shows them. --out keeps the lines.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax

from gated_jax import cli
from gated_jax.bench import attention
from gated_jax.bench import data
from gated_jax.bench import families
from gated_jax.bench import profile
from gated_jax.bench import step
from gated_jax.bench.step import Workload

Record = dict[str, Any]
COLUMNS = {
  'matmul': ('shape', 'dtype', 'ms', 'tflops', 'spread'),
  'attention': (
    'shape', 'rows', 'backend', 'gate', 'direction', 'ms', 'tflops',
    'overhead', 'spread',
  ),
  'step': (
    'framework', 'name', 'model', 'batch', 'rows', 'ms', 'tokens_per_second',
    'mfu', 'memory_gib', 'overhead', 'spread', 'compile_s', 'failed',
  ),
  'profile': ('group', 'kernel', 'operation', 'ms', 'share', 'launches'),
  'peer': ('model', 'gate', 'batch', 'ours', 'peer', 'ratio'),
  'data': (
    'source', 'tokenizer', 'mean', 'files', 'ours', 'loop', 'floor', 'library',
    'ratio', 'least', 'most', 'first_s',
  ),
  'families': (
    'family', 'parameters', 'decode', 'decode_spread', 'train', 'train_spread',
  ),
}  # fmt: skip
FORMS = {
  'mfu': '.3f',
  'share': '.1%',
  'spread': '.1%',
  'decode_spread': '.1%',
  'train_spread': '.1%',
  'overhead': '+.2%',
  'ratio': '.3f',
  'least': '.3f',
  'most': '.3f',
}
CPU_TIME = 'count the time of the processor: others use the machine'


def words(text: str) -> list[str]:
  """The words of a flag that takes several, divided by commas."""
  return [word for word in text.split(',') if word]


def shapes(text: str) -> list[str]:
  """Names of shapes; argparse prints the reason where one means nothing."""
  try:
    for name in words(text):
      attention.shape_of(name)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None
  return words(text)


def families_of(text: str) -> list[str]:
  """Names of families; argparse prints the reason where one is unknown."""
  for name in words(text):
    if name not in families.FAMILIES:
      known = ', '.join(families.FAMILIES)
      raise argparse.ArgumentTypeError(
        f'family {name!r} must be one of {known}'
      )
  return words(text)


def gates_of(known: Collection[str]) -> Callable[[str], list[str]]:
  """Reads names of gates; argparse prints the reason where one is unknown."""

  def gates(text: str) -> list[str]:
    """The names."""
    for name in words(text):
      if name not in known:
        reason = f'gate {name!r} must be one of {", ".join(known)}'
        raise argparse.ArgumentTypeError(reason)
    return words(text)

  return gates


def parser() -> argparse.ArgumentParser:
  """The command line; a workload's fields are flags of their names."""
  top = cli.Parser(
    prog='python -m gated_jax.bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kinds = top.add_subparsers(dest='kind', required=True)
  shared = cli.Parser(add_help=False)
  shared.add_argument('--out', default='', help='file for the JSON lines')
  shared.add_argument('--rounds', type=cli.count, default=7)
  shared.add_argument('--matmul', type=cli.count, default=8192)
  kind = kinds.add_parser('attention', parents=[shared])
  kind.add_argument('--shapes', type=shapes, default=['4k', '16k'])
  kind.add_argument('--backends', type=words, default=['auto'])
  kind.add_argument('--rows', choices=('whole', 'packed'), default='whole')
  known = gates_of(attention.GATES)
  kind.add_argument('--gates', type=known, default=attention.GATES)
  for name in ('step', 'profile', 'peer'):
    kind = kinds.add_parser(name, parents=[shared])
    kind.add_argument('--steps', type=cli.count, default=5, help='in a turn')
    if name == 'step':
      kind.add_argument('--cpu_time', action='store_true', help=CPU_TIME)
    for field in dataclasses.fields(Workload):
      if field.name == 'gate' and name == 'step':
        known = gates_of(step.GATES)
        kind.add_argument('--gates', type=known, default=attention.GATES)
      elif type(field.default) is bool:
        kind.add_argument(
          f'--{field.name}',
          action=argparse.BooleanOptionalAction,
          default=field.default,
        )
      else:
        kind.add_argument(
          f'--{field.name}', type=type(field.default), default=field.default
        )
  kind.add_argument(
    '--repeats', type=cli.count, default=2, help='processes of each'
  )
  kind = kinds.add_parser('data', parents=[shared])
  kind.add_argument(
    '--tokens', type=cli.count, default=20_000_000, help='in arrays'
  )
  kind.add_argument(
    '--text', type=cli.count, default=4_000_000, help='characters'
  )
  kind = kinds.add_parser('families', parents=[shared])
  kind.add_argument('--cpu_time', action='store_true', help=CPU_TIME)
  kind.add_argument(
    '--only', type=families_of, default=list(families.FAMILIES), help='of them'
  )
  return top


def workload(options: argparse.Namespace, **change: Any) -> Workload:
  """The workload that the flags describe, with some fields changed."""
  fields = {f.name for f in dataclasses.fields(Workload)}
  given = {n: v for n, v in vars(options).items() if n in fields}
  return Workload(**given | change)


def run_attention(options: argparse.Namespace) -> Iterator[Record]:
  """A product of matrices, then every shape on every backend."""
  yield attention.matmul(options.matmul, options.rounds)
  segments = 'none' if options.rows == 'whole' else 'packed'
  for shape in options.shapes:
    for backend in options.backends:
      try:
        yield from attention.bench(
          shape, backend, segments, options.rounds, options.gates
        )
      except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        yield {
          'bench': 'attention',
          'shape': shape,
          'backend': backend,
          'failed': str(error).splitlines()[0][:200],
        }


def run_step(options: argparse.Namespace) -> Iterator[Record]:
  """A product of matrices, then the gates in turns."""
  product = attention.matmul(options.matmul, options.rounds)
  yield product
  works = {gate: workload(options, gate=gate) for gate in options.gates}
  clock = time.process_time if options.cpu_time else time.perf_counter
  yield from step.bench(
    works, options.rounds, options.steps, product['tflops'] * 1e12, clock
  )


def run_profile(options: argparse.Namespace) -> Iterator[Record]:
  """The largest kernels, then the groups that they all belong to."""
  kernels = profile.kernels(workload(options))
  yield from kernels[:40]
  yield from profile.groups(kernels)


def run_peer(options: argparse.Namespace) -> Iterator[Record]:
  """Both frameworks by turns, each time in a new process."""
  work = workload(options)
  counts = [str(options.rounds), str(options.steps)]
  flags = [
    f'--{"" if value is not False else "no-"}{name}'
    + ('' if isinstance(value, bool) else f'={value}')
    for name, value in dataclasses.asdict(work).items()
    if name != 'gate'
  ]
  with tempfile.TemporaryDirectory() as folder:
    lines = pathlib.Path(folder) / 'lines'
    commands = {
      'peer': ['peer_torch', json.dumps(dataclasses.asdict(work)), *counts],
      'ours': [
        '', 'step', f'--gates={work.gate}', f'--out={lines}', *flags,
        f'--rounds={options.rounds}', f'--steps={options.steps}',
        f'--matmul={options.matmul}',
      ],
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.repeats):
      for name, (module, *rest) in commands.items():
        for record in _measure(name, module, rest, lines, folder):
          yield record
          if 'tokens_per_second' in record:
            speeds[name].append(record['tokens_per_second'])
  middle = {
    name: statistics.median(found) if found else 0.0
    for name, found in speeds.items()
  }
  yield {
    'bench': 'peer',
    **dataclasses.asdict(work),
    **middle,
    'ratio': middle['ours'] / middle['peer'] if middle['peer'] else 0.0,
  }


def run_data(options: argparse.Namespace) -> Iterator[Record]:
  """Arrays of ids, then text."""
  yield from data.arrays(options.rounds, options.tokens)
  yield from data.text(options.rounds, options.text)


def run_families(options: argparse.Namespace) -> Iterator[Record]:
  """Every family in turns."""
  clock = time.process_time if options.cpu_time else time.perf_counter
  yield from families.bench(options.only, options.rounds, clock)


def _measure(
  name: str, module: str, rest: list[str], lines: pathlib.Path, folder: str
) -> Iterator[Record]:
  """The records of one process; its compilation cache outlives it."""
  environment = dict(os.environ)
  if name == 'peer':
    environment['JAX_PLATFORMS'] = 'cpu'  # PyTorch has the device for itself
  else:
    environment.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/jax')
  lines.unlink(missing_ok=True)
  where = '.'.join(filter(None, ('gated_jax.bench', module)))
  done = subprocess.run(
    [sys.executable, '-m', where, *rest],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
    check=False,
  )
  text = lines.read_text() if lines.exists() else done.stdout
  records = [
    json.loads(line) for line in text.splitlines() if line.startswith('{')
  ]
  if done.returncode:
    records.append(
      {'bench': 'step', 'name': name, 'failed': f'exit {done.returncode}'}
    )
  yield from (record for record in records if 'bench' in record)


def table(records: list[Record]) -> str:
  """One block of aligned columns for each kind of record."""
  blocks = []
  for kind, names in COLUMNS.items():
    chosen = [r for r in records if r['bench'] == kind]
    names = tuple(n for n in names if any(n in r for r in chosen))
    rows = [names] + [
      tuple(_cell(name, record.get(name, '')) for name in names)
      for record in chosen
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks += [
      '  '.join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
      for row in rows
      if chosen
    ]
  return '\n'.join(blocks)


def _cell(name: str, value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return format(value, FORMS.get(name, ',.0f' if value >= 1e4 else '.4g'))


def bench(arguments: list[str]) -> None:
  """Prints each measurement as it comes, then the table."""
  options = parser().parse_args(arguments)
  run = {
    'attention': run_attention,
    'step': run_step,
    'profile': run_profile,
    'peer': run_peer,
    'data': run_data,
    'families': run_families,
  }
  records = []
  for record in run[options.kind](options):
    line = json.dumps(record)
    print(line, flush=True)
    records.append(record)
    if options.out:
      with open(options.out, 'a', encoding='utf-8') as file:
        file.write(line + '\n')
  print(table(records))


def main(arguments: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  return cli.run(lambda: bench(arguments))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
