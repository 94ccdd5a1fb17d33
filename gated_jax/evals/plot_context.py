"""Loss by position and retrieval by length, under each rotation.

`context.py` measures them. One colour is one arm; the mean of its seeds is a
line, their range a shade. Dotted is what was trained, solid is any other
rotation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from gated_jax.evals.plot_style import dress
from gated_jax.evals.plot_style import panels
from gated_jax.evals.plot_style import styles
from gated_jax.evals.records import Record

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

TRAINED = 'trained'  # the name of figures under the rotation of training


def context(runs: Sequence[Record]) -> 'Figure | None':
  """Loss by position, then a panel for each task."""
  runs = [record for record in runs if record.context]
  if not runs:
    return None
  style = styles(runs)
  first = next(iter(runs[0].context.values()))
  figure, (losses, *places) = panels(1 + len(first['retrieval']), columns=2)
  dress(losses, 'Held-out loss by position', 'position', 'nats per token')
  for place, task in zip(places, first['retrieval'], strict=True):
    dress(place, f'Retrieval: {task}', 'tokens of the text', 'share found')
    place.set_ylim(0, 1)
  for (arm, name), group in _groups(runs).items():
    look = {
      'color': style[arm]['color'],
      'ls': ':' if name == TRAINED else '-',
      'label': f'{arm}, {name}',
    }
    tables = [np.array(figures['loss']) for figures in group]
    # The beginning of a row is far above the rest.
    _shade(losses, tables[0][1:, 0], [t[1:, 1] for t in tables], look)
    for place, task in zip(places, first['retrieval'], strict=True):
      shares = [list(figures['retrieval'][task].values()) for figures in group]
      lengths = [int(n) for n in group[0]['retrieval'][task]]
      _shade(place, lengths, shares, look)
      place.set_xscale('log', base=2)
      place.set_xticks(lengths, [str(n) for n in lengths])
      place.minorticks_off()
  losses.legend(frameon=False, fontsize=8)
  return figure


def _groups(
  runs: Sequence[Record],
) -> dict[tuple[str, str], list[dict[str, Any]]]:
  """Arm and rotation to the figures of every seed."""
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for record in runs:
    for name, figures in record.context.items():
      groups.setdefault((record.arm, name), []).append(figures)
  return groups


def _shade(
  axes: 'Axes', x: Any, rows: Sequence[Any], look: dict[str, Any]
) -> None:
  """The mean of rows, and where they lie."""
  values = np.array(rows)
  axes.plot(x, values.mean(0), lw=1.3, marker='.', ms=4, **look)
  low, high = values.min(0), values.max(0)
  axes.fill_between(x, low, high, color=look['color'], alpha=0.15, lw=0)
