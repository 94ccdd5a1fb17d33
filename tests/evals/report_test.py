"""Tables and figures of runs whose numbers are known."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gated_jax import cli
from gated_jax.evals import measures
from gated_jax.evals import records
from gated_jax.evals import report
from gated_jax.evals.records import Record

# Arm to loss, attention on the first token in layers 0, 1 and from 2 on,
# activations, and the paper's figures of all three.
ARMS = {
  'baseline': (1.5, 0.4, 400.0, (6.0, 0.5, 1000)),
  'headwise': (1.4, 0.1, 100.0, (5.8, 0.07, 98)),
  'value': (1.45, 0.3, 90.0, (5.9, 0.3, 125)),
  'broad': (1.6, 0.35, 300.0, (5.95, 0.45, 900)),
}
PAPER = ('ppl', 'first_token', 'max_activation')


def run(arm, seed=0, shift=0.0, claim='sinks', rate=1e-3):
  loss, sink, activation, paper = ARMS[arm]
  heads = np.full((4, 2), 0.9)
  heads[2:] = [[sink, sink], [sink, sink]]
  steps = (100, 200)
  return Record(
    name=f'{claim}_{arm}_{rate:g}_{seed}',
    about={
      'claim': claim,
      'arm': arm,
      'seed': seed,
      'rate': rate,
      'steps': 200,
      'tokens_per_step': 1000,
      'paper': dict(zip(PAPER, paper, strict=True)),
    },
    curve=[[s, 9.0 - s / 50 + shift] for s in steps],
    probes=[
      {
        'step': s,
        'validation/loss': loss + shift,
        'sink': heads.mean(1).tolist(),
        'activation': [1.0, 1.0, activation, activation],
      }
      for s in steps
    ],
    last={
      'step': 200,
      'validation/loss': loss + shift,
      'activation/max': activation,
      'attention_logit/max': 50.0,
    },
    probe={
      'first_token': heads.tolist(),
      'near_first_token': heads.tolist(),
      'activation': [1.0, 1.0, activation, activation],
      'gate_mean': [] if arm == 'baseline' else heads.tolist(),
      'gate_histogram': []
      if arm == 'baseline'
      else np.full((4, 22), 1 / 22).tolist(),
    },
    spikes=0,
  )


RUNS = [
  run('baseline'),
  run('baseline', seed=1, shift=0.02),
  *(run(arm) for arm in ARMS if arm != 'baseline'),
]


def cells(table):
  """First cell of each row to the others."""
  rows = [line.strip('| ').split(' | ') for line in table.splitlines()[2:]]
  return {row[0]: row[1:] for row in rows}


def test_an_arm_has_the_mean_and_the_range_of_its_seeds():
  rows = cells(report.arm_table(RUNS, 2))
  assert rows['baseline'][0] == '2'
  assert rows['baseline'][2] == '1.5100 (1.5000 to 1.5200)'
  # Compared with the baseline of its own seed.
  assert rows['headwise'][:4] == ['1', '0.1000', '1.4000', '0.100']
  # Layers 0 and 1 give all their attention to the first token.
  assert cells(report.arm_table(RUNS, 0))['headwise'][3] == '0.500'
  assert rows['baseline'][4:6] == ['100% (100% to 100%)'] * 2
  assert rows['headwise'][4] == '0%'


def test_the_paper_is_compared_by_direction():
  table = report.paper_table(RUNS, 2)
  losses = [line for line in table.splitlines() if 'held-out loss' in line]
  assert [line.rsplit('|', 2)[1].strip() for line in losses] == [
    'agrees',
    'agrees',
    'differs',  # broad: better in the paper, worse here
  ]
  assert '0.5 -> 0.07 | 0.400 -> 0.100 | 0.14; 0.25 | agrees' in table
  assert report.paper_table(RUNS[2:], 2) == ''


def test_rank_correlations_are_those_of_the_arms_means():
  columns = {c.title: c for c in measures.columns(2)}
  value, _, number = measures.rank_correlation(RUNS, columns['F'])
  assert (value, number) == (pytest.approx(1.0), 4)
  # Ranks here 3 1 2 4, in the paper 4 1 2 3: 1 - 6 * 2 / (4 * 15).
  value, _, _ = measures.rank_correlation(RUNS, columns['held-out loss'])
  assert value == pytest.approx(0.8)
  assert math.isnan(measures.rank_correlation(RUNS[:2], columns['F'])[0])


def test_learning_rates_give_the_largest_stable_one_and_the_sensitivity():
  rates = {1e-3: 0.0, 2e-3: 0.2, 4e-3: 2.0}
  group = [
    run('baseline', shift=x, claim='stability', rate=r)
    for r, x in rates.items()
  ]
  row = cells(report.rate_table(group))['baseline']
  assert row[:4] == ['1.500', '1.700', '3.500', '0.002']
  # Excess over the best: 0, 0.2 and 2.
  assert measures.sensitivity(group) == pytest.approx(2.2 / 3)
  assert row[4] == '0.733'
  diverged = [*group[:2], Record(**{**vars(group[2]), 'outcome': 'diverged'})]
  # A run that diverged ends where it began, at 9 nats.
  start = max(r.curve[0][1] for r in diverged)
  assert measures.sensitivity(diverged) == pytest.approx(
    (0.2 + start - 1.5) / 3
  )
  assert 'diverged' in report.rate_table(diverged)


def test_the_command_prints_markdown_and_draws_every_figure(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  import matplotlib.image

  stability = [
    run(arm, claim='stability', rate=rate)
    for arm in ('baseline', 'headwise')
    for rate in (1e-3, 3e-3)
  ]
  packed = tmp_path / 'packed.json'
  records.pack([*RUNS, *stability], packed)
  report.main([str(packed)])
  printed = capsys.readouterr().out
  assert '## sinks' in printed
  assert '## stability' in printed
  report.main([str(packed), f'--out={tmp_path}/out'])
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {
    'report.md',
    'sinks_gates.png',
    'sinks_layers.png',
    'sinks_loss.png',
    'sinks_sinks.png',
    'stability_loss.png',
    'stability_rates.png',
  }
  for path in (tmp_path / 'out').glob('*.png'):
    pixels = matplotlib.image.imread(path)[..., :3]
    assert len(np.unique((pixels * 100).round() @ [1e6, 1e3, 1])) > 10, path


def test_arms_of_several_seeds_are_a_mean_in_a_band(tmp_path):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot_runs

  assert 'sinks_seeds.png' not in [
    path.name for path in plot_runs.figures(RUNS, tmp_path, 2)
  ]
  runs = [*RUNS, run('headwise', seed=1, shift=0.07)]
  figure = plot_runs.over_seeds(runs, plot_runs._seed_curves(runs, 2))
  loss = figure.axes[2]
  # Less than the baseline of the same seed by 0.1, and by 0.02 + 0.1 - 0.07.
  np.testing.assert_allclose(loss.lines[0].get_ydata(), [0.075, 0.075])
  heights = loss.collections[0].get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == pytest.approx((0.05, 0.1))
  (key,) = figure.legends
  assert [t.get_text() for t in key.get_texts()] == ['no gate', 'headwise gate']
  sink = figure.axes[0]
  np.testing.assert_allclose(sink.lines[1].get_ydata(), [0.1, 0.1])


def context_run(arm, seed, share):
  """A run whose loss and retrieval were measured."""
  figures = {
    'loss': [[64, 3.0], [128, 2.0 - share]],
    'retrieval': {'keys': {'64': share, '128': share / 2}},
  }
  record = run(arm, seed, claim='continued')
  return dataclasses.replace(record, context={'trained': figures})


def test_contexts_are_a_table_and_a_figure(tmp_path):
  runs = [context_run('baseline', 0, 0.5), context_run('baseline', 1, 0.75)]
  rows = report.context_table(runs).splitlines()
  assert rows[0] == '| arm | rotation | figure | 64 | 128 |'
  assert rows[2].endswith('| 3.000 (3.000 to 3.000) | 1.375 (1.250 to 1.500) |')
  assert rows[3].startswith('| baseline | trained | keys | 62% (50% to 75%) |')
  records.pack(runs, tmp_path / 'packed.json.gz')
  again = records.read([tmp_path / 'packed.json.gz'])
  assert again == runs
  pytest.importorskip('matplotlib')
  report.main([str(tmp_path / 'packed.json.gz'), f'--out={tmp_path}'])
  assert (tmp_path / 'continued_context.png').stat().st_size > 10_000
  assert '| baseline | trained | keys |' in (tmp_path / 'report.md').read_text()


def test_many_arms_are_dots_in_the_order_of_the_paper(tmp_path):
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot_arms

  runs = [*RUNS]
  for i in range(8):
    about = RUNS[2].about | {'arm': f'other_{i}', 'paper': {}}
    runs.append(dataclasses.replace(RUNS[2], about=about))
  figure = plot_arms.by_arm(runs, 2)
  labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
  assert labels[:4] == ['headwise', 'value', 'broad', 'baseline']
  records.pack(runs, tmp_path / 'packed.json')
  report.main([str(tmp_path / 'packed.json'), f'--out={tmp_path}'])
  assert {p.name for p in tmp_path.glob('*.png')} == {'sinks_arms.png'}


def test_means_of_a_model_without_later_layers_are_of_all_its_layers():
  columns = {c.title: c for c in measures.columns(4)}
  assert columns['F'].value(RUNS[0]) == pytest.approx((0.9 + 0.4) / 2)


def test_seeds_are_compared_with_the_baseline_of_the_same_seed():
  pytest.importorskip('matplotlib')
  from gated_jax.evals import plot_runs

  runs = [*RUNS, run('headwise', seed=1, shift=0.01)]
  steps, gains = plot_runs.gain(runs[-1], runs)
  np.testing.assert_array_equal(steps, [100, 200])
  np.testing.assert_allclose(gains, 1.52 - 1.41)
  assert not len(plot_runs.gain(runs[0], runs)[0])


def test_no_runs_are_one_line(tmp_path, capsys):
  assert cli.run(lambda: report.main([str(tmp_path)])) == cli.REFUSED
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert 'holds no metrics.jsonl' in error


def test_packed_runs_are_plain_json(tmp_path):
  records.pack(RUNS, tmp_path / 'packed.json')
  assert len(json.loads((tmp_path / 'packed.json').read_text())) == len(RUNS)
