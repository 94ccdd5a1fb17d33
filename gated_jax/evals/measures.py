"""Figures of runs as numbers: by arm, by learning rate, beside the paper's.

`report.py` prints them.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gated_jax.evals.diagnostics import SINK
from gated_jax.evals.records import Record

BASELINE = 'baseline'  # the arm that the others are compared with
# A run is stable where its loss lies less than this above the best rate's.
STABLE = 0.3


class Measure(NamedTuple):
  """One column of the tables.

  Attributes:
    title: Its heading.
    value: Its number in a run; NaN where it has none.
    form: How it is printed.
    paper: Its name among the paper's figures; '': the paper has none.
  """

  title: str
  value: Callable[[Record], float]
  form: str
  paper: str = ''


def first_layer(depth: int, from_layer: int) -> int:
  """The first layer of a mean; a model that has none so late counts whole."""
  return from_layer if depth > from_layer else 0


def columns(from_layer: int) -> list[Measure]:
  """The columns, over layers from this one on where layers are averaged."""

  def layers(name: str, reduce: Callable) -> Callable[[Record], float]:
    """A column that reduces a table's layers to one number."""

    def value(record: Record) -> float:
      """The number for one run; NaN where no layer is left."""
      rows = record.array(name)
      rows = rows[first_layer(len(rows), from_layer) :]
      return float(reduce(rows)) if len(rows) else math.nan

    return value

  def above(x: np.ndarray) -> float:
    """The share of heads that are sinks."""
    return float(np.mean(x > SINK))

  return [
    Measure('held-out loss', lambda r: r.value('validation/loss'), '{:.4f}',
            'ppl'),
    Measure('F', layers('first_token', np.mean), '{:.3f}', 'first_token'),
    Measure(f'heads > {SINK}', layers('first_token', above), '{:.0%}'),
    Measure(f'heads > {SINK}, T=64', layers('near_first_token', above),
            '{:.0%}'),
    Measure('largest head', layers('first_token', np.max), '{:.2f}'),
    Measure('activations', layers('activation', np.mean), '{:.3g}',
            'max_activation'),
    Measure('attention logit', layers('attention_logit', np.max), '{:.3g}'),
    Measure('mean gate', layers('gate_mean', np.mean), '{:.3f}', 'mean_gate'),
  ]  # fmt: skip


def arms(runs: Sequence[Record]) -> dict[str, list[Record]]:
  """Runs by arm, in the order in which arms come."""
  groups: dict[str, list[Record]] = {}
  for record in runs:
    groups.setdefault(record.arm, []).append(record)
  return groups


def spread(values: Sequence[float], form: str) -> str:
  """The mean of seeds, and from where to where they lie."""
  finite = [x for x in values if math.isfinite(x)]
  if not finite:
    return ''
  mean = form.format(np.mean(finite))
  if len(finite) == 1:
    return mean
  low, high = form.format(min(finite)), form.format(max(finite))
  return f'{mean} ({low} to {high})'


def final_loss(record: Record) -> float:
  """Held-out loss at the end; infinite for a run that diverged."""
  if record.outcome == 'diverged':
    return math.inf
  return record.value('validation/loss')


def is_stable(record: Record, group: Sequence[Record]) -> bool:
  """Tells whether there is no spike, and a loss near that of the best rate."""
  best = min(final_loss(r) for r in group)
  return final_loss(record) < best + STABLE and not record.spikes


def sensitivity(group: Sequence[Record]) -> float:
  """Mean excess loss over the learning rates (Wortsman et al., 2309.14322).

  Excess over the best rate's loss, at most what the loss was at the start.
  """
  losses = [final_loss(r) for r in group]
  starts = [r.curve[0][1] for r in group if r.curve]
  if not starts or not any(map(math.isfinite, losses)):
    return math.nan
  best, start = min(losses), max(starts)
  return float(np.mean([min(x, start) - best for x in losses]))


def mean_of(group: Sequence[Record], column: Measure) -> float:
  """The measure's mean over seeds; NaN where one has none."""
  values = [column.value(record) for record in group]
  return float(np.mean(values)) if values else math.nan


def baseline_of(
  runs: Sequence[Record], group: Sequence[Record], column: Measure
) -> float:
  """The baseline's mean over the seeds that a group has; NaN without it.

  A seed draws the order of the text and what is held out, so that runs of
  different seeds are measured on different text.
  """
  seeds = {record.seed for record in group}
  base = [r for r in runs if r.arm == BASELINE and r.seed in seeds]
  return mean_of(base, column) if len(base) == len(seeds) else math.nan


def gains(runs: Sequence[Record], group: Sequence[Record]) -> list[float]:
  """Held-out loss of the baseline of the same seed less that of each run."""
  base = {r.seed: final_loss(r) for r in runs if r.arm == BASELINE}
  return [base[r.seed] - final_loss(r) for r in group if r.seed in base]


def paper_of(group: Sequence[Record], column: Measure) -> float:
  """The paper's figure for that arm; NaN where it has none."""
  figures = group[0].about.get('paper') or {}
  return float(figures.get(column.paper, math.nan))


def rate_of(record: Record) -> float:
  """A run's largest learning rate."""
  return float(record.about.get('rate', record.about.get('learning_rate', 0)))


def rank_correlation(
  runs: Sequence[Record], column: Measure
) -> tuple[float, float, int]:
  """Spearman's, of the arms' figures with the paper's; its p; how many arms.

  Figures are distances from the baseline of the same seeds, or themselves
  where a baseline has none.
  """
  pairs = []
  for group in arms(runs).values():
    base = baseline_of(runs, group, column)
    value = mean_of(group, column) - (base if math.isfinite(base) else 0.0)
    pairs.append((value, paper_of(group, column)))
  pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
  if len(pairs) < 3:
    return math.nan, math.nan, len(pairs)
  result = stats.spearmanr(*zip(*pairs, strict=True))
  return float(result.statistic), float(result.pvalue), len(pairs)
