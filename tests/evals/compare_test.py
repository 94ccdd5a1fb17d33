"""Runs are put beside each other: a table, settings, a picture."""

import json

import numpy as np
import pytest

from gated_jax import cli
from gated_jax import paths
from gated_jax.checkpoint.folder import RUN
from gated_jax.config import RunConfig
from gated_jax.config import to_dict
from gated_jax.evals import compare
from gated_jax.evals import records


def write_run(folder, loss, gate=None, **settings):
  """A run's folder, with a checkpoint's settings where some are given."""
  folder.mkdir(parents=True)
  lines = [
    {'step': s, 'loss': loss + 1 / s, 'tokens_per_second': 1000.0 * s}
    for s in range(1, 6)
  ]
  for step in (3, 5):
    probe = {'step': step, 'validation/loss': loss + 0.1, 'sink/mean': 0.2,
             'sink/layer_00': 0.2, 'activation/mean': 7.0,
             'activation/layer_00': 7.0}  # fmt: skip
    lines.append(probe | ({} if gate is None else {'gate/mean': gate}))
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  if settings:
    step = folder / 'checkpoints/5'
    for name in ('params', 'run'):
      (step / name).mkdir(parents=True)
    config = to_dict(RunConfig(**settings))
    (step / RUN).write_text(json.dumps({'config': config}))
  return folder


def cells(table):
  return [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table.splitlines()
  ]


def test_a_row_has_what_was_measured_and_an_empty_cell_for_the_rest(tmp_path):
  write_run(tmp_path / 'gated', 2.0, gate=0.25)
  write_run(tmp_path / 'plain', 3.0)
  head, _, gated, plain = cells(
    compare.table(list(compare.read([tmp_path]).values()))
  )
  gated, plain = (dict(zip(head, row, strict=True)) for row in (gated, plain))
  assert gated == {
    'run': 'gated', 'step': '5', 'training loss': '2.2000',
    'held-out loss': '2.1000', 'first-token attention': '0.2000',
    'activations': '7', 'mean gate': '0.250', 'tokens/s': '3,000',
    'outcome': 'done',
  }  # fmt: skip
  assert plain['mean gate'] == ''
  assert plain['training loss'] == '3.2000'


def test_settings_that_differ_are_named_and_no_others(tmp_path):
  write_run(tmp_path / 'a', 2.0, seed=1)
  write_run(tmp_path / 'b', 2.0, seed=2)
  write_run(tmp_path / 'c', 2.0)
  text = compare.settings(compare.read([tmp_path]))
  assert cells(text)[2] == ['`seed`', '1', '2']
  assert text.count('`') == 2
  assert text.endswith('Without a checkpoint that tells its settings: c.')


def test_the_command_draws_a_panel_for_all_that_was_measured(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  import matplotlib.image

  from gated_jax.evals import plot_compare

  paths = [
    write_run(tmp_path / name / 'run', loss, gate)
    for name, loss, gate in (('x', 2.0, 0.3), ('y', 3.0, None))
  ]
  out = tmp_path / 'out'
  compare.main([*map(str, paths), f'--out={out}'])
  assert {p.name for p in out.iterdir()} == {'comparison.md', 'comparison.png'}
  printed = capsys.readouterr().out
  assert str(out / 'comparison.png') in printed
  # Folders of one name are told apart by their paths.
  assert f'| {paths[0]} |' in printed
  pixels = matplotlib.image.imread(out / 'comparison.png')[..., :3]
  assert len(np.unique((pixels * 100).round() @ [1e6, 1e3, 1])) > 10
  figure = plot_compare.panels_of(list(compare.read(paths).values()))
  lines = {axes.get_title(): axes.lines for axes in figure.axes}
  assert len(lines) == 6
  assert len(lines['Gate score']) == 1
  np.testing.assert_array_equal(lines['Speed'][0].get_xdata(), range(1, 6))
  np.testing.assert_allclose(lines['Held-out loss'][1].get_ydata(), 3.1)


def test_packed_runs_are_drawn_without_a_speed(tmp_path):
  write_run(tmp_path / 'a', 2.0)
  records.pack(records.read([tmp_path]), tmp_path / 'packed.json')
  runs = compare.read([tmp_path / 'packed.json'])
  assert [r.name for r in runs.values()] == ['a']
  assert 'tokens/s' not in compare.table(list(runs.values()))


@pytest.mark.parametrize(
  ('given', 'line'),
  [
    (['missing'], 'missing holds no metrics.jsonl'),
    (['a', 'a'], 'a is given twice'),
    (['empty'], 'empty has logged no loss yet'),
    (['many'], '21 runs are too many'),
    ([], 'the following arguments are required: runs'),
  ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, given, line):
  write_run(tmp_path / 'a', 2.0)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty/metrics.jsonl').write_text('')
  for number in range(21 if given == ['many'] else 0):
    write_run(tmp_path / 'many' / str(number), 2.0)
  arguments = [str(tmp_path / name) for name in given]
  assert cli.run(lambda: compare.main(arguments)) == cli.REFUSED
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert line in error


def test_without_matplotlib_the_table_is_there_all_the_same(
  tmp_path, capsys, monkeypatch
):
  write_run(tmp_path / 'a', 2.0)
  monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
  arguments = [str(tmp_path / 'a'), f'--out={tmp_path}/out']
  assert cli.run(lambda: compare.main(arguments)) == cli.REFUSED
  said = capsys.readouterr()
  assert '| a | 5 |' in said.out
  assert "pip install 'gated_jax[plot]'" in said.err
  assert (tmp_path / 'out/comparison.md').exists()


def test_a_bucket_that_is_not_there_is_said_so(storage):
  with pytest.raises(ValueError, match='there is no bucket gs://absent-one'):
    compare.read([paths.expand('gs://absent-one/runs')])
