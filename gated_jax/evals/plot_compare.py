"""Curves of runs over each other: one panel for each thing that is measured.

Read `compare.py` for the command.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from gated_jax.evals.plot import BLUE
from gated_jax.evals.plot import ORANGE
from gated_jax.evals.plot_runs import layer_means
from gated_jax.evals.plot_runs import series
from gated_jax.evals.plot_style import COLOURS
from gated_jax.evals.plot_style import dress
from gated_jax.evals.plot_style import panels
from gated_jax.evals.records import Record

if TYPE_CHECKING:
  from matplotlib.figure import Figure

PALETTE = (BLUE, ORANGE, *COLOURS)
LINES = ('-', '--', ':')  # for the runs beyond as many as there are colours

Points = tuple[Sequence[float], Sequence[float]]


def _columns(points: Sequence[Sequence[float]]) -> Points:
  """Steps, and values."""
  return [step for step, _ in points], [value for _, value in points]


# Panels: title, unit, and a run's steps and values.
PANELS: tuple[tuple[str, str, Callable[[Record], Any]], ...] = (
  ('Training loss', 'nats per token', lambda r: _columns(r.curve)),
  ('Held-out loss', 'nats per token', lambda r: series(r, 'validation/loss')),
  ('Attention on the first token', 'probability, mean of layers',
   lambda r: layer_means(r, 'sink', 0)),
  ('Largest activation', 'of a layer, mean of layers',
   lambda r: layer_means(r, 'activation', 0)),
  ('Gate score', 'mean', lambda r: series(r, 'gate/mean')),
  ('Speed', 'tokens per second', lambda r: _columns(r.speed)),
)  # fmt: skip
# Values below zero do not exist in these, and the distance from it is a fact.
FROM_ZERO = ('Attention on the first token', 'Gate score', 'Speed')


def panels_of(runs: Sequence[Record]) -> 'Figure':
  """A figure of all runs, with a panel for whatever one of them measured."""
  shown = [panel for panel in PANELS if any(len(panel[2](r)[0]) for r in runs)]
  figure, grid = panels(len(shown), height=3.0)
  for axes, (title, unit, points) in zip(grid, shown, strict=True):
    dress(axes, title, 'step', unit)
    for index, record in enumerate(runs):
      steps, values = points(record)
      if not len(steps):
        continue
      axes.plot(
        steps,
        values,
        color=PALETTE[index % len(PALETTE)],
        ls=LINES[index // len(PALETTE) % len(LINES)],
        lw=1.3,
        marker='o' if len(steps) < 12 else None,
        ms=3.5,
      )
    if title in FROM_ZERO:
      axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-9))
    elif title == 'Training loss':
      _leave_out_the_start(axes, [r for r in runs if r.curve])
  handles = [
    _key(index, record.name, figure) for index, record in enumerate(runs)
  ]
  figure.legend(
    handles=handles,
    frameon=False,
    fontsize=9,
    loc='outside lower center',
    ncols=min(4, len(runs)),
  )
  return figure


def _key(index: int, name: str, figure: 'Figure') -> Any:
  """A line for the legend, which every run has, whatever it measured."""
  axes = figure.axes[0]
  (line,) = axes.plot(
    [],
    [],
    color=PALETTE[index % len(PALETTE)],
    ls=LINES[index // len(PALETTE) % len(LINES)],
    label=name,
  )
  return line


def _leave_out_the_start(axes: Any, runs: Sequence[Record]) -> None:
  """Limits in which losses of the first steps do not flatten the others."""
  late = [y for r in runs for _, y in r.curve[len(r.curve) // 20 :]]
  low, high = float(np.min(late)), float(np.max(late))
  margin = 0.05 * (high - low) or 0.1
  axes.set_ylim(low - margin, high + margin)
