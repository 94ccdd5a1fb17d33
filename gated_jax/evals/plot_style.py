"""How figures of many runs look: colours, axes, a light grid.

One colour is one arm in every figure; its seeds share it, and so, dashed, does
the arm with QK-norm.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from gated_jax.evals.plot import BLUE
from gated_jax.evals.plot import GREY
from gated_jax.evals.plot import ORANGE
from gated_jax.evals.records import Record

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Colours that stay apart in grey and for colour-blind eyes, and what an arm of
# each name always has; the others take what is left.
COLOURS = (
  '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#7a5195', '#999933', '#444444',
)  # fmt: skip
OWN = {'baseline': ORANGE, 'elementwise': BLUE, 'headwise': '#009e73'}
DASHED = '_qk'  # how the name of an arm with QK-norm ends


def styles(runs: Sequence[Record]) -> dict[str, dict[str, Any]]:
  """How the lines of each arm are drawn."""
  names = list(dict.fromkeys(r.arm for r in runs))
  bases = list(dict.fromkeys(n.removesuffix(DASHED) for n in names))
  left = [c for c in COLOURS if c not in [OWN.get(n) for n in bases]]
  others = [name for name in bases if name not in OWN]
  palette = {n: left[i % len(left)] for i, n in enumerate(others)} | OWN
  return {
    name: {
      'color': palette[name.removesuffix(DASHED)],
      'ls': '--' if name.endswith(DASHED) else '-',
    }
    for name in names
  }


def panels(
  number: int, columns: int = 3, height: float = 3.4
) -> 'tuple[Figure, list[Axes]]':
  """A row or more of axes on a figure that no window will show."""
  import matplotlib.figure

  columns = min(columns, number)
  rows = -(-number // columns)
  figure = matplotlib.figure.Figure(
    figsize=(4.2 * columns, height * rows), layout='constrained'
  )
  grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
  for axes in grid[number:]:
    axes.set_axis_off()
  return figure, grid[:number]


def dress(axes: 'Axes', title: str, x: str, y: str) -> None:
  """Title, labels and a light grid."""
  axes.set_title(title, fontsize=10)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color=GREY, alpha=0.2)
  axes.set_axisbelow(True)
