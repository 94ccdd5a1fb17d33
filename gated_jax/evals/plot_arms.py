"""Many arms in one figure: a row for each, a dot for each of its seeds."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from gated_jax.evals.measures import BASELINE
from gated_jax.evals.measures import arms
from gated_jax.evals.measures import columns
from gated_jax.evals.measures import gains
from gated_jax.evals.measures import paper_of
from gated_jax.evals.plot import GREY
from gated_jax.evals.plot_style import OWN
from gated_jax.evals.plot_style import dress
from gated_jax.evals.plot_style import panels
from gated_jax.evals.records import Record

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def by_arm(runs: Sequence[Record], from_layer: int) -> 'Figure':
  """A row for each arm, best in the paper first; a dot for each seed.

  Where the paper has a figure of the arm, a cross stands for it: the logarithm
  of its perplexity below its baseline's, which is a loss.
  """
  groups = arms(runs)
  names = sorted(groups, key=lambda name: -_paper_gain(groups, name))
  rows = {name: -place for place, name in enumerate(names)}
  figure, axes = panels(3, height=0.26 * len(names) + 0.8)
  titled = {column.title: column for column in columns(from_layer)}
  shown = titled['F'], titled['activations']
  titles = ('Loss below the baseline', 'First-token attention', 'Activations')
  for place, title in zip(axes, titles, strict=True):
    dress(place, title, '', '')
    place.set_yticks(list(rows.values()), list(rows), fontsize=8)
    place.label_outer()
  for name, group in groups.items():
    row = [rows[name]] * len(group)
    look: dict[str, Any] = {'s': 18, 'color': OWN.get(name, GREY)}
    gained = gains(runs, group)
    axes[0].scatter(gained, row[: len(gained)], **look)
    there = _paper_gain(groups, name)
    axes[0].scatter(there, rows[name], marker='x', c='black')
    for place, column in zip(axes[1:], shown, strict=True):
      place.scatter([column.value(r) for r in group], row, **look)
  axes[0].axvline(0, color=GREY, lw=0.8)
  axes[0].set_xlabel('nats; cross: the paper')
  axes[2].set_xscale('log')
  axes[2].set_xticks([100, 200, 400], ['100', '200', '400'])
  axes[2].minorticks_off()
  return figure


def _paper_gain(groups: dict[str, list[Record]], name: str) -> float:
  """The paper's loss below its baseline's; -inf where it has none."""
  column = columns(0)[0]
  base = paper_of(groups.get(BASELINE, groups[name]), column)
  gain = math.log(base / paper_of(groups[name], column))
  return gain if math.isfinite(gain) else -math.inf
