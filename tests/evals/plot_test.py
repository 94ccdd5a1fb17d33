"""Figures are files with something on them; no display, no matplotlib early."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from gated_jax.evals import metric_files
from gated_jax.evals.diagnostics import Report


def report(gated=True, maps=True):
  rng = np.random.default_rng(0)
  histogram = rng.dirichlet(np.ones(22), size=3 if gated else 0).reshape(-1, 22)
  weights = np.tril(rng.uniform(size=(2, 16, 16)))
  weights /= weights.sum(-1, keepdims=True)
  scores = rng.uniform(size=(3 if gated else 0, 2))
  return Report(
    first_token=rng.uniform(size=(3, 2)),
    activation=np.array([1.0, 30.0, 900.0]),
    gate_mean=scores,
    gate_below=scores,
    gate_histogram=histogram,
    gate_norm=scores,
    maps={0: weights, 2: weights} if maps else {},
  )


@pytest.fixture
def metrics(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [json.dumps({'step': s, 'loss': 5 - s / 10}) for s in range(20)]
  lines.append(json.dumps({'step': 19, 'validation/loss': 3.2}))
  lines.append(json.dumps({'step': 20, 'loss': 'NaN'}))
  lines.append('{"step": 21, "lo')  # killed while writing
  path.write_text('\n'.join(lines))
  return path


def drawn(path):
  """How many different colours a picture has."""
  import matplotlib.image

  pixels = matplotlib.image.imread(path)[..., :3]
  return len(np.unique((pixels * 100).round() @ [1e6, 1e3, 1]))


def test_all_figures_of_a_gated_run_are_drawn(metrics, tmp_path):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  paths = plot.figures(metrics, report(), tmp_path / 'figures')
  assert [p.name for p in paths] == [
    'loss.png',
    'sink.png',
    'gate.png',
    'activation.png',
    'attention.png',
  ]
  for path in paths:
    assert drawn(path) > 10, path.name


def test_what_is_not_there_is_not_drawn(tmp_path):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  paths = plot.figures(
    tmp_path / 'missing.jsonl', report(gated=False, maps=False), tmp_path
  )
  assert [p.name for p in paths] == ['sink.png', 'activation.png']


def test_models_that_diverged_are_drawn_as_far_as_they_are_numbers(tmp_path):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  whole = report()
  broken = dataclasses.replace(
    whole,
    first_token=np.full((3, 2), np.nan),
    activation=np.array([2.0, np.inf, np.nan]),
    gate_mean=np.full((3, 2), np.nan),
    gate_histogram=np.zeros((3, 22)),
  )
  assert len(plot.figures(tmp_path / 'no.jsonl', broken, tmp_path)) == 4
  low, high = plot.activation_per_layer(broken).axes[0].get_ylim()
  assert low < 2 < high


def test_scores_outside_zero_and_one_have_columns_of_their_own():
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  def labels(figure):
    return {text.get_text() for text in figure.axes[0].get_xticklabels()}

  inside = report()
  inside.gate_histogram[:, [0, -1]] = 0
  assert {'0', '1'} < labels(plot.gate_histograms(inside))
  assert {'< 0', '> 1'} < labels(plot.gate_histograms(report()))


def test_curves_leave_out_what_is_no_number(metrics):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  figure = plot.loss_curve(metric_files.read(metrics))
  train, held_out = figure.axes[0].lines
  np.testing.assert_array_equal(train.get_xdata(), range(20))
  np.testing.assert_array_equal(held_out.get_ydata(), [3.2])
  assert plot.loss_curve([]) is None


def test_the_package_imports_without_matplotlib():
  program = (
    "import sys; sys.modules['matplotlib'] = None\n"
    'import gated_jax.evals.plot\n'
    'import gated_jax.evals.diagnostics\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=False,
    env={'PYTHONPATH': ':'.join(sys.path), 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr


def test_many_losses_are_smoothed_and_few_are_not():
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  records = [{'step': s, 'loss': 2.0 + (-1) ** s} for s in range(400)]
  raw, mean = plot.loss_curve(records).axes[0].lines
  assert np.ptp(raw.get_ydata()) == 2
  assert np.ptp(mean.get_ydata()[50:]) < 0.3
  np.testing.assert_allclose(plot.smoothed(np.ones(9), 3.0), 1)
  assert len(plot.loss_curve(records[:20]).axes[0].lines) == 1


@pytest.mark.parametrize('name', ['gate_histograms', 'sink_per_layer'])
def test_no_legend_lies_on_what_is_drawn(name):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot

  figure = getattr(plot, name)(report())
  figure.draw_without_rendering()
  (legend,) = figure.legends
  assert all(axes.get_legend() is None for axes in figure.axes)
  box = legend.get_window_extent()
  assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
