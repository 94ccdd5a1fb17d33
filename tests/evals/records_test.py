"""Runs are read from their folders, and packed files give the same back."""

import json
import math

import numpy as np
import pytest

from gated_jax.evals import records


def write_run(folder, losses, steps=None, **about):
  """A folder as train.py and the sweep leave it."""
  folder.mkdir(parents=True)
  about = {'claim': 'sinks', 'arm': 'baseline', 'seed': 0, **about}
  about['steps'] = steps or len(losses)
  (folder / 'run.json').write_text(json.dumps(about))
  (folder / 'probe.json').write_text(
    json.dumps({'first_token': [[0.1, None], [0.4, 0.2]], 'activation': [3, 9]})
  )
  lines = [{'step': i + 1, 'loss': x} for i, x in enumerate(losses)]
  last = {'step': len(losses)}
  lines.append({**last, 'sink/mean': 0.2, 'sink/layer_00': 0.1,
                'sink/layer_01': 0.3, 'activation/layer_00': 3.0})  # fmt: skip
  lines.append({**last, 'validation/loss': 1.2345678})
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text + '{"step": 9, "lo')
  return folder


def test_a_folder_gives_its_curve_its_probes_and_its_last_values(tmp_path):
  write_run(tmp_path / 'one', [3.0, 2.0, None, 1.0])
  (record,) = records.read([tmp_path])
  assert (record.name, record.arm, record.seed) == ('one', 'baseline', 0)
  assert record.outcome == 'done'
  # A loss that was no number has no point.
  assert record.curve == [[1, 3.0], [2, 2.0], [4, 1.0]]
  assert record.probes == [
    {'step': 4, 'sink': [0.1, 0.3], 'activation': [3.0],
     'validation/loss': 1.2346}
  ]  # fmt: skip
  assert record.value('validation/loss') == 1.2346
  assert math.isnan(record.value('no such metric'))
  np.testing.assert_array_equal(record.array('first_token')[1], [0.4, 0.2])
  assert np.isnan(record.array('first_token')[0, 1])


@pytest.mark.parametrize(
  ('steps', 'log', 'outcome'),
  [
    (2, '', 'done'),
    (5, '', 'cut'),
    (5, 'error: loss or gradient was not finite in 10 steps\n', 'diverged'),
  ],
)
def test_a_run_is_done_or_cut_or_diverged(tmp_path, steps, log, outcome):
  folder = write_run(tmp_path / 'run', [3.0, 2.0], steps)
  (folder / 'log.txt').write_text('step 1\n' + log)
  assert records.read([folder])[0].outcome == outcome


def test_what_was_packed_is_read_back_the_same(tmp_path):
  for name in ('a', 'b'):
    write_run(tmp_path / 'runs' / name, [3.0, 2.0], arm=name)
  found = records.read([tmp_path / 'runs'])
  packed = tmp_path / 'results' / 'packed.json'
  records.pack(found, packed)
  assert records.read([packed]) == found
  assert [r.arm for r in found] == ['a', 'b']


def test_a_packed_file_has_the_digits_that_are_shown(tmp_path):
  write_run(tmp_path / 'run', [2.345678] * 12_345)
  record = records.read([tmp_path / 'run'])[0]
  record.probe['activation'] = [1234.5, None]
  records.pack([record], tmp_path / 'packed.json')
  (packed,) = records.read([tmp_path / 'packed.json'])
  assert packed.curve[-1] == [12_345, 2.346]
  assert packed.probe['activation'] == [1230.0, None]


def test_long_curves_are_means_of_as_many_steps_each():
  steps = list(range(1, 1001))
  points = records.thin(steps, [float(s) for s in steps])
  assert len(points) == records.POINTS
  assert points[0] == [10, 5.5]
  assert points[-1] == [1000, 995.5]


@pytest.mark.parametrize(
  ('noise', 'height', 'expected'),
  [
    (0.01, 0.5, 3),
    (0.01, 0.2, 0),  # below what counts
    (0.5, 0.5, 0),  # no more than losses vary anyway
    (0.5, 6.0, 3),
  ],
)
def test_spikes_stand_out_from_how_losses_vary(noise, height, expected):
  random = np.random.default_rng(0)
  losses = 5 - np.arange(600) / 2000 + noise * random.uniform(-1, 1, 600)
  losses[[100, 101, 400]] += height
  assert records.spikes(losses.tolist()) == expected


def test_runs_too_short_for_a_median_have_no_spikes():
  assert records.spikes([1.0, 9.0, 1.0]) == 0


@pytest.mark.parametrize('text', ['{"a": 1}', '[{"no": "run"}]', '[', '[1]'])
def test_a_file_that_is_no_packed_one_is_named(tmp_path, text):
  path = tmp_path / 'broken.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=r'broken\.json is no file of packed'):
    records.read([path])


def test_a_folder_without_runs_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'holds no metrics\.jsonl'):
    records.read([tmp_path])
