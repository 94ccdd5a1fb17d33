"""Results of runs as Markdown and figures: beside the paper, with spread.

    python -m gated_jax.evals.report runs/evidence --out=runs/report
    python -m gated_jax.evals.report runs/evidence --pack=docs/results/x.json
    python -m gated_jax.evals.report docs/results/*.json \
      --out=docs/figures/evidence

Takes run folders, folders of them, and files that --pack made. Writes
`report.md` and PNG files into --out; without it, the Markdown is printed.
Means leave out the layers before --from-layer (2: layers 0 and 1 never become
sink layers). Read `records.py` for what is kept of a run.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from collections.abc import Sequence

from gated_jax import cli
from gated_jax import paths
from gated_jax.evals import measures
from gated_jax.evals import records
from gated_jax.evals.records import Record
from gated_jax.paths import Path

FROM_LAYER = 2  # the first layer of means, unless asked otherwise


def arm_table(runs: Sequence[Record], from_layer: int) -> str:
  """A row for each arm: every measure over its seeds."""
  columns = measures.columns(from_layer)
  head = ['arm', 'seeds', 'below baseline', *(c.title for c in columns)]
  rows = [
    [
      arm,
      str(len(group)),
      ''
      if arm == measures.BASELINE
      else measures.spread(measures.gains(runs, group), '{:.4f}'),
      *(measures.spread([c.value(r) for r in group], c.form) for c in columns),
    ]
    for arm, group in measures.arms(runs).items()
  ]
  return markdown([head, *rows])


def paper_table(runs: Sequence[Record], from_layer: int) -> str:
  """Each arm against the baseline, in the paper and here; '' without one."""
  groups = measures.arms(runs)
  if measures.BASELINE not in groups:
    return ''
  head = ['arm', 'measure', 'paper', 'here', 'ratio there; here', 'direction']
  rows = []
  for arm, group in groups.items():
    for column in measures.columns(from_layer):
      base = measures.baseline_of(runs, group, column)
      value = measures.mean_of(group, column)
      paper_base = measures.paper_of(groups[measures.BASELINE], column)
      paper_value = measures.paper_of(group, column)
      if arm == measures.BASELINE or not all(
        map(math.isfinite, (base, value, paper_base, paper_value))
      ):
        continue
      agrees = (value < base) == (paper_value < paper_base)
      rows.append(
        [
          arm,
          column.title,
          f'{paper_base:g} -> {paper_value:g}',
          f'{column.form.format(base)} -> {column.form.format(value)}',
          f'{paper_value / paper_base:.2f}; {value / base:.2f}',
          'agrees' if agrees else 'differs',
        ]
      )
  return markdown([head, *rows]) if rows else ''


def correlations(runs: Sequence[Record], from_layer: int) -> str:
  """Rank correlation of the arms' figures with the paper's, as a list."""
  lines = []
  for column in measures.columns(from_layer):
    value, chance, number = measures.rank_correlation(runs, column)
    if number < 4:
      continue
    lines.append(
      f'- {column.title}: rank correlation {value:.2f} over '
      f'{number} arms (p = {chance:.2g})'
    )
  return '\n'.join(lines)


def rate_table(runs: Sequence[Record]) -> str:
  """Final loss of each arm at each learning rate, spikes in brackets."""
  rates = sorted({measures.rate_of(r) for r in runs})
  head = ['arm', *(f'{rate:g}' for rate in rates), 'largest stable', 'LR sens.']
  rows = []
  for arm, group in measures.arms(runs).items():
    by_rate = {measures.rate_of(record): record for record in group}
    cells = [_rate_cell(by_rate.get(rate)) for rate in rates]
    steady = [
      rate for rate, r in by_rate.items() if measures.is_stable(r, group)
    ]
    largest = f'{max(steady):g}' if steady else 'none'
    rows.append([arm, *cells, largest, f'{measures.sensitivity(group):.3f}'])
  return markdown([head, *rows])


def context_table(runs: Sequence[Record]) -> str:
  """Figures of evals.context: a row for each arm, rotation and figure."""
  groups: dict[tuple[str, str], list[Record]] = {}
  for record in runs:
    for name in record.context:
      groups.setdefault((record.arm, name), []).append(record)
  rows, lengths = [], ['']
  for (arm, name), group in groups.items():
    measured = [record.context[name] for record in group]
    losses = [dict(figures['loss']) for figures in measured]
    lengths = list(next(iter(measured[0]['retrieval'].values())))
    ends = [_nearest(losses[0], int(length)) for length in lengths]
    cells = [
      measures.spread([x[end] for x in losses], '{:.3f}') for end in ends
    ]
    rows.append([arm, name, f'loss near there, {len(group)} seeds', *cells])
    for task in measured[0]['retrieval']:
      values = [
        [figures['retrieval'][task][n] for figures in measured] for n in lengths
      ]
      cells = [measures.spread(x, '{:.0%}') for x in values]
      rows.append([arm, name, task, *cells])
  return markdown([['arm', 'rotation', 'figure', *lengths], *rows])


def _nearest(places: Iterable[float], place: int) -> float:
  """The one of some places that is nearest to another."""
  distance = {abs(one - place): one for one in places}
  return distance[min(distance)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """A table of the first row's headings."""
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]])


def report(runs: Sequence[Record], from_layer: int) -> str:
  """All of it, a section for each claim."""
  sections = []
  for claim in sorted({str(r.about.get('claim', 'runs')) for r in runs}):
    chosen = [r for r in runs if str(r.about.get('claim', 'runs')) == claim]
    sections.append(f'## {claim}')
    if len({measures.rate_of(r) for r in chosen}) > 1:
      sections.append(rate_table(chosen))
      continue
    sections.append(
      f'Means over layers from {from_layer} on; of several seeds the mean and '
      'the range. Other arms are compared with the baseline of the same seeds.'
    )
    sections += [
      part
      for part in (
        arm_table(chosen, from_layer),
        paper_table(chosen, from_layer),
        correlations(chosen, from_layer),
        context_table(chosen) if any(r.context for r in chosen) else '',
      )
      if part
    ]
    sections += [
      f'{record.name}: {record.outcome} at step {record.value("step"):.0f}'
      for record in chosen
      if record.outcome != 'done'
    ]
  return '\n\n'.join(sections) + '\n'


def _rate_cell(record: Record | None) -> str:
  if record is None:
    return ''
  if record.outcome == 'diverged':
    return 'diverged'
  loss = f'{measures.final_loss(record):.3f}'
  return f'{loss} ({record.spikes})' if record.spikes else loss


def main(argv: Sequence[str]) -> None:
  """The command."""
  parser = cli.Parser(
    prog='python -m gated_jax.evals.report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', nargs='+', type=paths.expand)
  parser.add_argument('--out', type=paths.expand)
  parser.add_argument('--pack', type=paths.expand)
  parser.add_argument('--from-layer', type=int, default=FROM_LAYER)
  options = parser.parse_args(argv)
  runs = records.read(options.runs)
  if options.pack:
    records.pack(runs, options.pack)
  text = report(runs, options.from_layer)
  if options.out:
    _write(runs, text, options.out, options.from_layer)
  elif not options.pack:
    print(text, end='')


def _write(
  runs: Sequence[Record], text: str, folder: Path, from_layer: int
) -> None:
  from gated_jax.evals import plot_runs  # needs matplotlib

  folder.mkdir(parents=True, exist_ok=True)
  figures = plot_runs.figures(runs, folder, from_layer)
  links = ''.join(f'\n![{p.stem}]({p.name})\n' for p in figures)
  paths.write_bytes(folder / 'report.md', (text + links).encode())
  for path in [folder / 'report.md', *figures]:
    print(path)


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
