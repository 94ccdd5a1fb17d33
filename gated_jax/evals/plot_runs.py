"""Figures of many runs beside each other, as PNG files.

Read `report.py` for the tables of the same runs, `plot_style.py` for colours.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from gated_jax.evals.diagnostics import SINK
from gated_jax.evals.measures import first_layer
from gated_jax.evals.plot import GREY
from gated_jax.evals.plot import blank
from gated_jax.evals.plot import save
from gated_jax.evals.plot_arms import by_arm
from gated_jax.evals.plot_context import context
from gated_jax.evals.plot_seeds import over_seeds
from gated_jax.evals.plot_style import dress
from gated_jax.evals.plot_style import panels
from gated_jax.evals.plot_style import styles
from gated_jax.evals.records import Record
from gated_jax.ops.probes import EDGES
from gated_jax.ops.probes import NEAR
from gated_jax.paths import Path

if TYPE_CHECKING:
  from matplotlib.figure import Figure


# Arms beyond which curves cannot be told apart, and dots are drawn instead.
MANY = 9


def figures(
  runs: Sequence[Record], folder: Path, from_layer: int
) -> list[Path]:
  """Draws all there is something to draw for; the files written.

  Args:
    runs: of any claims; each claim has its own figures.
    folder: is there; old figures are replaced.
    from_layer: means over layers leave out those before it.
  """
  paths = []
  for claim in sorted({str(r.about.get('claim', 'runs')) for r in runs}):
    chosen = [r for r in runs if str(r.about.get('claim', 'runs')) == claim]
    drawn = _drawn(chosen, from_layer)
    for name, figure in drawn.items():
      if figure is None:
        continue
      path = folder / f'{claim}_{name}.png'
      save(figure, path, dpi=90)
      paths.append(path)
  return paths


def _drawn(
  runs: Sequence[Record], from_layer: int
) -> 'dict[str, Figure | None]':
  """Name to figure of one claim's runs."""
  if any(record.context for record in runs):
    return {'context': context(runs)}
  if len({r.about.get('rate') for r in runs}) > 1:
    return {'rates': loss_by_rate(runs), 'loss': loss_curves(runs, True)}
  if len({r.arm for r in runs}) > MANY:
    return {'arms': by_arm(runs, from_layer)}
  return {
    'seeds': over_seeds(runs, _seed_curves(runs, from_layer)),
    'loss': loss_curves(runs),
    'sinks': over_training(runs, from_layer),
    'layers': by_layer(runs),
    'gates': gate_histograms(runs),
  }


def _seed_curves(
  runs: Sequence[Record], from_layer: int
) -> list[tuple[str, Callable[[Record], Any]]]:
  """Titles and curves of the figure that is about a few arms."""
  return [
    ('Attention on the first token',
     lambda r: layer_means(r, 'sink', from_layer)),
    ('Largest activation of a layer',
     lambda r: layer_means(r, 'activation', from_layer)),
    ('Held-out loss below that of no gate', lambda r: gain(r, runs)),
  ]  # fmt: skip


def loss_curves(
  runs: Sequence[Record], by_rate: bool = False
) -> 'Figure | None':
  """Training loss over tokens, each run less the first baseline's, or a panel
  for each learning rate with the losses themselves."""
  runs = [r for r in runs if r.curve]
  if not runs:
    return None
  if by_rate:
    return _loss_by_panel(runs)
  style = styles(runs)
  figure, (left, right) = panels(2)
  dress(left, 'Training loss', 'million tokens', 'nats per token')
  dress(right, 'Held-out loss below the baseline', 'million tokens', '')
  named: set[str] = set()
  for record in runs:
    scale = record.tokens_per_step / 1e6
    steps, losses = np.array(record.curve).T
    label = '' if record.arm in named else record.arm
    named.add(record.arm)
    left.plot(steps * scale, losses, **style[record.arm], lw=1, label=label)
    steps, gains = gain(record, runs)
    right.plot(steps * scale, gains, **style[record.arm], lw=1.2, marker='.')
  left.set_ylim(*_middle([y for r in runs for _, y in r.curve[3:]]))
  right.axhline(0, color=GREY, lw=0.8)
  left.legend(frameon=False, fontsize=8)
  return figure


def gain(
  record: Record, runs: Sequence[Record]
) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and held-out loss of the baseline with its seed less the run's."""
  base = [r for r in runs if r.arm == 'baseline' and r.seed == record.seed]
  if not base or record.arm == 'baseline':
    return np.zeros(0), np.zeros(0)
  first = dict(zip(*series(base[0], 'validation/loss'), strict=True))
  steps, losses = series(record, 'validation/loss')
  shared = [(s, first[s] - x) for s, x in zip(steps, losses, strict=True)
            if s in first]  # fmt: skip
  both = np.array(shared or np.zeros((0, 2)))
  return both[:, 0], both[:, 1]


def _loss_by_panel(runs: Sequence[Record]) -> 'Figure':
  rates = sorted({float(r.about['rate']) for r in runs})
  style = styles(runs)
  figure, axes = panels(len(rates), columns=3, height=2.6)
  limits = _middle([y for r in runs for _, y in r.curve[5:]])
  named: set[str] = set()
  for place, rate in zip(axes, rates, strict=True):
    dress(place, f'learning rate {rate:g}', 'step', 'nats per token')
    for record in runs:
      if float(record.about['rate']) != rate:
        continue
      steps, losses = np.array(record.curve).T
      label = '' if record.arm in named else record.arm
      named.add(record.arm)
      place.plot(steps, losses, **style[record.arm], lw=1.1, label=label)
    place.set_ylim(*limits)
  figure.legend(frameon=False, fontsize=8, loc='outside upper right', ncols=6)
  return figure


def over_training(runs: Sequence[Record], from_layer: int) -> 'Figure | None':
  """First-token attention and activations over training."""
  style = styles(runs)
  figure, axes = panels(2)
  shown = False
  for place, name, title in zip(
    axes,
    ('sink', 'activation'),
    ('Attention on the first token', 'Largest activation of a layer'),
    strict=True,
  ):
    dress(place, f'{title}, mean of layers', 'million tokens', '')
    named: set[str] = set()
    for record in runs:
      steps, values = layer_means(record, name, from_layer)
      if not len(steps):
        continue
      shown = True
      label = '' if record.arm in named else record.arm
      named.add(record.arm)
      place.plot(
        steps * record.tokens_per_step / 1e6,
        values,
        **style[record.arm],
        lw=1.2,
        label=label,
      )
    place.set_ylim(bottom=0)
  axes[0].legend(frameon=False, fontsize=8)
  return figure if shown else None


def layer_means(
  record: Record, name: str, from_layer: int
) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and the mean over layers of a probe written layer by layer."""
  steps, means = [], []
  for probe in record.probes:
    values = probe.get(name, [])
    first = first_layer(len(values), from_layer)
    layers = [x for x in values[first:] if x is not None]
    if layers:
      steps.append(probe['step'])
      means.append(np.mean(layers))
  return np.array(steps), np.array(means)


def by_layer(runs: Sequence[Record]) -> 'Figure | None':
  """First-token attention, sink heads and activations by layer, at the end."""
  runs = [r for r in runs if len(r.array('first_token'))]
  if not runs:
    return None
  style = styles(runs)
  figure, axes = panels(3)
  shown: list[tuple[str, Callable[[Record], Any]]] = [
    ('Attention on the first token', lambda r: r.array('first_token').mean(1)),
    (f'Share of heads above {SINK}, T = {NEAR}',
     lambda r: (r.array('near_first_token') > SINK).mean(1)),
    ('Largest activation', lambda r: r.array('activation')),
  ]  # fmt: skip
  for place, (title, values) in zip(axes, shown, strict=True):
    dress(place, title, 'layer', '')
    for arm in dict.fromkeys(r.arm for r in runs):
      seeds = np.array([values(r) for r in runs if r.arm == arm])
      index = np.arange(seeds.shape[1])
      mean = seeds.mean(0)
      place.plot(index, mean, marker='o', ms=3, lw=1.2, label=arm, **style[arm])
      if len(seeds) > 1 and place is not axes[1]:  # heads are too few to shade
        place.fill_between(
          index,
          seeds.min(0),
          seeds.max(0),
          color=style[arm]['color'],
          alpha=0.2,
          lw=0,
        )
  for place in axes[:2]:
    place.set_ylim(bottom=0)
  axes[2].set_yscale('log')
  axes[0].legend(frameon=False, fontsize=8)
  return figure


def gate_histograms(runs: Sequence[Record]) -> 'Figure | None':
  """How the scores of all layers are distributed, a line for each arm."""
  gated = [r for r in runs if len(r.array('gate_histogram'))]
  if not gated:
    return None
  style = styles(runs)
  figure, axes = blank('Gate scores, all layers', 'score', 'share of scores')
  middle = (EDGES[1:] + EDGES[:-1]) / 2
  for arm in dict.fromkeys(r.arm for r in gated):
    seeds = [r.array('gate_histogram') for r in gated if r.arm == arm]
    share = np.mean([x.mean(0) for x in seeds], axis=0)[1:-1]
    axes.plot(middle, share, marker='.', lw=1.2, label=arm, **style[arm])
  axes.set_ylim(bottom=0)
  axes.legend(frameon=False, fontsize=8)
  return figure


def loss_by_rate(runs: Sequence[Record]) -> 'Figure | None':
  """Final held-out loss, activations and logits over learning rates."""
  style = styles(runs)
  figure, axes = panels(3)
  shown: list[tuple[str, Callable[[Record], float]]] = [
    ('Held-out loss', lambda r: r.value('validation/loss')),
    ('Largest activation', lambda r: r.value('activation/max')),
    ('Largest attention logit', lambda r: r.value('attention_logit/max')),
  ]
  for place, (title, value) in zip(axes, shown, strict=True):
    dress(place, title, 'learning rate', '')
    for arm in dict.fromkeys(r.arm for r in runs):
      points = sorted(
        (float(r.about['rate']), value(r)) for r in runs if r.arm == arm
      )
      x, y = np.array(points).T
      place.plot(x, y, marker='o', ms=4, lw=1.2, label=arm, **style[arm])
    place.set_xscale('log')
    rates = sorted({float(r.about['rate']) for r in runs})
    place.set_xticks(rates, [f'{1e3 * r:g}e-3' for r in rates], fontsize=7)
    place.minorticks_off()
  for place in axes[1:]:
    place.set_yscale('log')
  axes[0].legend(frameon=False, fontsize=8)
  return figure


def series(record: Record, name: str) -> tuple[list[float], list[float]]:
  """Steps and values at which a probe was written."""
  points = [(p['step'], p[name]) for p in record.probes if name in p]
  return [s for s, _ in points], [x for _, x in points]


def _middle(values: Sequence[float]) -> tuple[float, float]:
  """Limits that a few very large values do not decide."""
  finite = [x for x in values if math.isfinite(x)] or [0.0, 1.0]
  low, high = float(np.min(finite)), float(np.quantile(finite, 0.97))
  return low - 0.05 * (high - low), high + 0.1 * (high - low)
