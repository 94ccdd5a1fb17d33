"""Arms of several seeds over training: their means, and how far seeds lie.

Read `plot_runs.py` for figures in which every run has a line of its own.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gated_jax.evals.measures import BASELINE
from gated_jax.evals.measures import arms
from gated_jax.evals.plot import GREY
from gated_jax.evals.plot_style import DASHED
from gated_jax.evals.plot_style import dress
from gated_jax.evals.plot_style import panels
from gated_jax.evals.plot_style import styles
from gated_jax.evals.records import Record

if TYPE_CHECKING:
  from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def over_seeds(
  runs: Sequence[Record],
  curves: Sequence[tuple[str, Callable[[Record], Curve]]],
) -> 'Figure | None':
  """A panel for each measure, a line and a band for each arm.

  Args:
    runs: of one claim. Arms of one seed are left out, for they have no spread.
    curves: titles of the panels, and what is drawn of each run.

  Returns:
    The figure; None where no two arms have several seeds.
  """
  groups = {name: g for name, g in arms(runs).items() if len(g) > 1}
  if len(groups) < 2:
    return None
  style = styles([record for group in groups.values() for record in group])
  figure, axes = panels(len(curves), height=3.0)
  for place, (title, curve) in zip(axes, curves, strict=True):
    dress(place, title, 'million tokens', '')
    for name, group in groups.items():
      steps, values = _together([curve(record) for record in group])
      if not len(steps):
        continue
      scale = steps * group[0].tokens_per_step / 1e6
      label = _label(name)
      place.plot(scale, values.mean(0), **style[name], lw=1.8, label=label)
      low, high = values.min(0), values.max(0)
      colour = style[name]['color']
      place.fill_between(scale, low, high, color=colour, alpha=0.2, lw=0)
    place.set_ylim(bottom=min(0, place.dataLim.y0))
    place.axhline(0, color=GREY, lw=0.8)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    frameon=False,
    ncols=len(groups),
    loc='outside lower center',
  )
  return figure


def _label(arm: str) -> str:
  kind = arm.removesuffix(DASHED)
  label = 'no gate' if kind == BASELINE else f'{kind} gate'
  return label if kind == arm else f'{label}, QK-norm'


def _together(curves: Sequence[Curve]) -> Curve:
  """The steps that all curves have, and values [seeds, steps]."""
  tables = [dict(zip(*curve, strict=True)) for curve in curves if len(curve[0])]
  shared = sorted(set.intersection(*map(set, tables))) if tables else []
  values = [[table[step] for step in shared] for table in tables]
  return np.array(shared), np.array(values)
