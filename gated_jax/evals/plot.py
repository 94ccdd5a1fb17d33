"""Figures of a run as PNG files: loss, sinks, gates, activations, attention.

matplotlib is imported inside the functions, so that the package imports
without it; it draws to files only and needs no display.
"""

import io
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from gated_jax import paths
from gated_jax.evals import metric_files
from gated_jax.evals.diagnostics import Report
from gated_jax.ops.probes import EDGES
from gated_jax.paths import Path
from gated_jax.paths import expand

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

SMOOTHED = 50  # losses beyond which the curve is smoothed, to about as many
# Colours that stay apart in grey and for colour-blind eyes.
BLUE, ORANGE, GREY = '#0072b2', '#d55e00', '#888888'


def figures(
  metrics_path: str | os.PathLike[str],
  report: Report,
  folder: str | os.PathLike[str],
) -> list[Path]:
  """Draws all there is something to draw for.

  Args:
    metrics_path: a run's metrics.jsonl; need not exist.
    report: what `diagnostics.probe` found.
    folder: made if it is not there; old figures are replaced.

  Returns:
    The files written.
  """
  folder = expand(folder)
  folder.mkdir(parents=True, exist_ok=True)
  records = metric_files.read(expand(metrics_path))
  drawn = {
    'loss': loss_curve(records),
    'sink': sink_per_layer(report),
    'gate': gate_histograms(report),
    'activation': activation_per_layer(report),
    'attention': attention_maps(report.maps),
  }
  written = []
  for name, figure in drawn.items():
    if figure is None:
      continue
    path = folder / f'{name}.png'
    save(figure, path, dpi=120)
    written.append(path)
  return written


def save(figure: 'Figure', path: Path, dpi: int) -> None:
  """Writes a figure as a PNG file, on a disk or in a bucket."""
  picture = io.BytesIO()
  figure.savefig(picture, format='png', dpi=dpi)
  paths.write_bytes(path, picture.getvalue())


def loss_curve(records: list[dict[str, Any]]) -> 'Figure | None':
  """Training and held-out loss over steps."""
  train = _series(records, 'loss')
  held_out = _series(records, 'validation/loss')
  if not train[0] and not held_out[0]:
    return None
  figure, axes = blank('Loss', 'step', 'nats per token')
  if len(train[0]) > SMOOTHED:
    # One batch says little: the line to read is a mean of several.
    steps, losses = train
    axes.plot(steps, losses, color=BLUE, lw=0.8, alpha=0.25, label='one batch')
    mean = smoothed(np.array(losses), len(losses) / SMOOTHED)
    axes.plot(steps, mean, color=BLUE, lw=1.5, label='training, smoothed')
  elif train[0]:
    axes.plot(*train, color=BLUE, lw=1.5, label='training')
  if held_out[0]:
    axes.plot(*held_out, color=ORANGE, lw=1.5, marker='o', label='held out')
  axes.legend(frameon=False)
  return figure


def smoothed(values: np.ndarray, memory: float) -> np.ndarray:
  """The mean of each value and those before it, older ones counting less.

  Args:
    values: in the order of their steps.
    memory: how many values back one counts 1/e of the newest.
  """
  decay = np.exp(-1 / max(memory, 1e-9))
  total = weight = 0.0
  means = np.empty(len(values))
  for index, value in enumerate(values):
    total, weight = decay * total + value, decay * weight + 1
    means[index] = total / weight
  return means


def sink_per_layer(report: Report) -> 'Figure | None':
  """First-token attention: a bar per layer, a dot per head."""
  if not len(report.first_token):
    return None
  layers = report.first_token.mean(axis=1)
  title = f'Attention on the first token (mean {layers.mean():.3f})'
  figure, axes = blank(title, 'layer', 'probability')
  index = np.arange(len(layers))
  axes.bar(index, layers, color=BLUE, alpha=0.6, label='mean of heads')
  heads = report.first_token.shape[1]
  axes.scatter(
    np.repeat(index, heads),
    report.first_token.ravel(),
    s=20 if len(layers) <= 12 else 8,
    color=ORANGE,
    edgecolors='none',
    alpha=0.8,
    zorder=3,
    label='one head',
  )
  top = _finite(report.first_token).max(initial=0.0)
  axes.set_ylim(0, max(0.1, min(1.0, 1.1 * top)))
  _layer_ticks(axes.xaxis, len(layers))
  figure.legend(frameon=False, loc='outside lower right', ncols=2)
  return figure


def gate_histograms(report: Report) -> 'Figure | None':
  """How gate scores are distributed in each layer, and their means."""
  if not len(report.gate_histogram):
    return None
  import matplotlib.colors

  layers, _ = report.gate_histogram.shape
  mean = report.gate_mean.mean(axis=1)
  title = f'Gate scores by layer (mean {mean.mean():.3f})'
  figure, axes = blank(title, 'score', 'layer', grid=False)
  # The outer bins, below 0 and above 1, are drawn as wide as the rest, and
  # only where an activation reaches them.
  width = EDGES[1] - EDGES[0]
  edges = np.concatenate([[-width], EDGES, [1 + width]])
  low, high = (bool(report.gate_histogram[:, i].any()) for i in (0, -1))
  shown = slice(0 if low else 1, None if high else -1)
  edges = edges[shown]
  # The root shows small shares too, beside a column that has most of them.
  mesh = axes.pcolormesh(
    edges,
    np.arange(layers + 1) - 0.5,
    report.gate_histogram[:, shown],
    cmap='Blues',
    norm=matplotlib.colors.PowerNorm(0.5, 0, report.gate_histogram.max() or 1),
  )
  # A mean beyond the edge is drawn in the column that stands for it.
  inside = np.clip(mean, edges[0] + width / 2, edges[-1] - width / 2)
  axes.plot(inside, np.arange(layers), 'o-', color=ORANGE, ms=4, label='mean')
  _layer_ticks(axes.yaxis, layers)
  ticks = {x: f'{x:g}' for x in (0.2, 0.4, 0.6, 0.8)}
  ticks |= {-width / 2: '< 0'} if low else {0: '0'}
  ticks |= {1 + width / 2: '> 1'} if high else {1: '1'}
  axes.set_xticks(list(ticks), list(ticks.values()))
  # Every place inside may have a bar.
  figure.legend(frameon=False, loc='outside lower right')
  figure.colorbar(mesh, ax=axes, label='share of scores')
  return figure


def activation_per_layer(report: Report) -> 'Figure | None':
  """Largest activation of the residual stream after each layer."""
  if not len(report.activation):
    return None
  import matplotlib.ticker

  mean = np.format_float_positional(
    report.activation.mean(), precision=3, fractional=False, trim='-'
  )
  figure, axes = blank(
    f'Largest activation (mean of layers {mean})',
    'layer',
    'largest |activation|',
  )
  index = np.arange(len(report.activation))
  axes.plot(index, report.activation, 'o-', color=BLUE)
  axes.set_yscale('log')
  positive = _finite(report.activation)
  positive = positive[positive > 0]
  low, top = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
  # At least one decade, so that flat looks flat.
  middle = math.sqrt(low) * math.sqrt(top)
  low, top = min(low / 1.2, middle / 3.2), max(top * 1.2, middle * 3.2)
  axes.set_ylim(low, top)
  if top < 1e4 * low:
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  _layer_ticks(axes.xaxis, len(index))
  return figure


def attention_maps(maps: Mapping[int, np.ndarray]) -> 'Figure | None':
  """Attention weights of chosen layers, averaged over heads."""
  if not maps:
    return None
  import matplotlib.figure

  columns = min(2, len(maps))
  rows = -(-len(maps) // columns)
  figure = matplotlib.figure.Figure(
    figsize=(4.2 * columns, 3.8 * rows), layout='constrained'
  )
  grid = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes in grid[len(maps) :]:
    axes.set_axis_off()
  for axes, (layer, weights) in zip(grid, sorted(maps.items()), strict=False):
    mean = np.asarray(weights).mean(axis=0)
    # The future stays blank, unlike weights that are zero.
    mean[np.triu_indices(len(mean), 1)] = np.nan
    # The root shows small weights too; a sink is a bright first column.
    image = axes.imshow(np.sqrt(mean), cmap='magma', vmin=0, vmax=1)
    axes.set_title(f'layer {layer}', fontsize=10)
    axes.set_xlabel('key')
    axes.set_ylabel('query')
    axes.spines[['top', 'right']].set_visible(False)
    axes.label_outer()
  bar = figure.colorbar(image, ax=grid.tolist(), shrink=0.8)
  bar.set_label('attention weight, mean of heads')
  ticks = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0])
  bar.set_ticks(np.sqrt(ticks).tolist(), labels=[f'{t:g}' for t in ticks])
  return figure


def _finite(values: np.ndarray) -> np.ndarray:
  """Those that are numbers: a model that diverged is drawn as far as it is."""
  return values[np.isfinite(values)]


def _series(
  records: list[dict[str, Any]], name: str
) -> tuple[list[Any], list[Any]]:
  """Steps and values where a metric was written and is a number."""
  paths = [
    (r['step'], r[name])
    for r in records
    if isinstance(r.get(name), int | float) and math.isfinite(r[name])
  ]
  return [step for step, _ in paths], [value for _, value in paths]


def blank(
  title: str, x: str, y: str, grid: bool = True
) -> 'tuple[Figure, Axes]':
  """One pair of axes on a figure that no window will show."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(6.4, 4), layout='constrained')
  axes = figure.subplots()
  axes.set_title(title, fontsize=11)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.spines[['top', 'right']].set_visible(False)
  if grid:
    axes.grid(axis='y', color=GREY, alpha=0.2)
    axes.set_axisbelow(True)
  return figure, axes


def _layer_ticks(axis: Any, layers: int) -> None:
  """Whole numbers, at most a dozen of them."""
  axis.set_ticks(np.arange(0, layers, max(1, -(-layers // 12))))
