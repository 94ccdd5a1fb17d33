"""Runs beside each other: curves over each other, figures in a table.

    python -m gated_jax.evals.compare runs/gated runs/ungated --out=runs/both

Takes folders of runs, finished or not, folders of them, and files that
`gated_jax.evals.report --pack` made. Prints a table and the settings that
differ, and writes both as `comparison.md` beside `comparison.png`: loss, sinks,
activations, gate scores and speed. Read `report.py` for tables of many seeds.
"""

import argparse
import collections
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import paths
from gated_jax.config import differences
from gated_jax.config import to_dict
from gated_jax.evals import metric_files
from gated_jax.evals import records
from gated_jax.evals.records import Record
from gated_jax.evals.report import markdown
from gated_jax.paths import Path

MOST = 20  # runs, of which more make no readable picture


def _last_loss(record: Record) -> float:
  """The mean of the last training losses, as the curve has it."""
  return record.curve[-1][1] if record.curve else math.nan


def speed(record: Record) -> float:
  """The median of tokens per second; NaN where nothing tells it."""
  values = [value for _, value in record.speed]
  return statistics.median(values) if values else math.nan


# The columns of the table: heading, number, format.
COLUMNS: tuple[tuple[str, Callable[[Record], float], str], ...] = (
  ('step', lambda r: r.value('step'), '{:.0f}'),
  ('training loss', _last_loss, '{:.4f}'),
  ('held-out loss', lambda r: r.value('validation/loss'), '{:.4f}'),
  ('first-token attention', lambda r: r.value('sink/mean'), '{:.4f}'),
  ('activations', lambda r: r.value('activation/mean'), '{:.3g}'),
  ('mean gate', lambda r: r.value('gate/mean'), '{:.3f}'),
  ('tokens/s', speed, '{:,.0f}'),
)


def read(given: Sequence[Path]) -> dict[Path, Record]:
  """Records by the places where they lie, in the order given.

  Each is named by its folder, or by the whole path where several folders have
  one name.

  Raises:
    ValueError: there is no run in one of them, a run that has logged nothing,
      one that is given twice, or too many.
  """
  runs: dict[Path, Record] = {}
  for path in given:
    paths.check_bucket(path)
    folders = metric_files.runs_in(path)
    for place in folders or [path]:
      for record in records.read([place]):
        name = place / record.name if paths.is_file(place) else place
        if name in runs:
          raise ValueError(f'{name} is given twice')
        if not record.curve and not record.probes:
          raise ValueError(f'{name} has logged no loss yet')
        runs[name] = record
  if len(runs) > MOST:
    raise ValueError(
      f'{len(runs)} runs are too many for one picture: name {MOST} at most, or '
      'have gated_jax.evals.report group their seeds'
    )
  often = collections.Counter(record.name for record in runs.values())
  return {
    path: dataclasses.replace(record, name=str(path))
    if often[record.name] > 1
    else record
    for path, record in runs.items()
  }


def table(runs: Sequence[Record]) -> str:
  """A row for each run; a cell stays empty where nothing was measured."""
  columns = [
    column
    for column in COLUMNS
    if any(_cell(column[1](record), column[2]) for record in runs)
  ]
  head = ['run', *(title for title, _, _ in columns), 'outcome']
  rows = [
    [record.name, *(_cell(f(record), form) for _, f, form in columns),
     record.outcome]
    for record in runs
  ]  # fmt: skip
  return markdown([head, *rows])


def _cell(value: float, form: str) -> str:
  """A number as the table has it; '' for what is none."""
  return '' if math.isnan(value) else form.format(value)


def settings(runs: Mapping[Path, Record]) -> str:
  """Settings in which runs differ, as their newest checkpoints have them."""
  known: dict[str, dict[str, Any]] = {}
  missing = []
  for path, record in runs.items():
    try:
      known[record.name] = to_dict(checkpoint.load_config(path))
    except (ValueError, checkpoint.CheckpointError):
      missing.append(record.name)
  changed: dict[str, None] = {}
  configs = list(known.values())
  for config in configs[1:]:
    changed |= dict.fromkeys(differences(configs[0], config))
  parts = []
  if changed:
    rows = [
      [f'`{name}`', *(_setting(config, name) for config in configs)]
      for name in changed
    ]
    parts.append(markdown([['setting', *known], *rows]))
  elif len(known) > 1:
    parts.append('No setting differs.')
  if missing:
    names = ', '.join(missing)
    parts.append(f'Without a checkpoint that tells its settings: {names}.')
  return '\n\n'.join(parts)


def _setting(config: Mapping[str, Any], name: str) -> str:
  """A setting by its full name; '' where a config has none."""
  value: Any = config
  for part in name.split('.'):
    value = value.get(part, '') if isinstance(value, Mapping) else ''
  return str(value)


def main(argv: Sequence[str]) -> None:
  """The command."""
  parser = cli.Parser(
    prog='python -m gated_jax.evals.compare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', nargs='+', type=paths.expand)
  parser.add_argument('--out', type=paths.expand, default='comparison')
  options = parser.parse_args(argv)
  runs = read(options.runs)
  text = f'{table(list(runs.values()))}\n\n{settings(runs)}'.strip() + '\n'
  print(text)
  out = options.out
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'comparison.md'
  picture = '\n![The runs over each other](comparison.png)\n'
  paths.write_bytes(path, (text + picture).encode())
  print(path)
  print(_draw(list(runs.values()), out / 'comparison.png'))


def _draw(runs: Sequence[Record], path: Path) -> Path:
  """Writes the picture; without matplotlib says how to get it."""
  from gated_jax.evals import plot
  from gated_jax.evals import plot_compare

  try:
    figure = plot_compare.panels_of(runs)
  except ImportError:
    raise ImportError(
      "the picture needs matplotlib: pip install 'gated_jax[plot]'"
    ) from None
  plot.save(figure, path, dpi=110)
  return path


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
