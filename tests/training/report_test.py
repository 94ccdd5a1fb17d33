"""The last words of a run: what came out, where it lies, what to type."""

import base64
import re
import types

import numpy as np
import pytest

from gated_jax.config import DataConfig
from gated_jax.config import RunConfig
from gated_jax.evals.diagnostics import Report
from gated_jax.evals.likelihood import Likelihood
from gated_jax.training import report
from gated_jax.training.build import RunState
from gated_jax.training.console import Console
from gated_jax.training.metrics import Clock

COMMAND = (
  '.venv/bin/python train.py --config=configs/smoke.py --config.steps=9 '
  "'--workdir=my runs/a'"
)
FOUND = Report(
  first_token=np.array([[0.25]]),
  activation=np.array([3.0]),
  gate_mean=np.array([[0.5]]),
  gate_below=np.array([[0.125]]),
  gate_histogram=np.zeros((0, 22)),
  gate_norm=np.array([[1.0]]),
  maps={},
)


def said(
  workdir,
  capsys,
  found=FOUND,
  skipped=(),
  prompt='import os',
  command=COMMAND,
  **settings,
):
  """The closing table by name."""
  run = object.__new__(RunState)  # with what the report looks at
  vars(run).update(
    config=RunConfig(**settings),
    workdir=workdir,
    console=Console(),
    clock=Clock(),
    state=types.SimpleNamespace(skipped=np.int32(2)),
    metrics=types.SimpleNamespace(path=workdir / 'metrics.jsonl'),
    checkpoints=types.SimpleNamespace(path=lambda step: workdir / str(step)),
    data=types.SimpleNamespace(
      skipped=dict(skipped),
      shortened=3,
      is_text=RunConfig(**settings).data.is_text,
    ),
    evaluation=types.SimpleNamespace(prompt=prompt),
  )
  loss = Likelihood(nats=200.0, tokens=100.0, text_bytes=50.0)
  result = report.RunResult(9, loss, found, 1234.5)
  report.closing(run, result, command)
  lines = capsys.readouterr().out.splitlines()[1:]
  width = len('first-token attention') + 2
  return {line[:width].strip(): line[width:].strip() for line in lines}


def test_everything_worth_knowing_is_said(tmp_path, capsys):
  found = said(tmp_path, capsys, figures=False)
  assert found.pop('time spent on').startswith('data 0.0%, compile 0.0%, ')
  assert found == {
    'validation loss': '2.0000 nats per token',
    'bits per byte': f'{4 / np.log(2):.4f}',
    'first-token attention': '0.2500',
    'heads above 0.3': '0.0%',
    'largest attention logit': 'n/a',
    'largest activation': '3.00',
    'mean of layers': '3.00',
    'mean gate': '0.5000',
    'gates below 0.1': '12.5%',
    'tokens/s': '1,234',
    'skipped updates': '2',
    'checkpoint': f'{tmp_path}/9',
    'metrics': f'{tmp_path}/metrics.jsonl',
    'figures': 'off (figures=False)',
    'sample from it': (
      f'.venv/bin/python -m gated_jax.decode --checkpoint={tmp_path}/9 '
      "'--prompt=import os'"
    ),
    'resume it': (
      '.venv/bin/python train.py --config=configs/smoke.py '
      "'--workdir=my runs/a' --config.steps=2000"
    ),
    'shortened': '3 conversations, to fit into a row',
  }


def test_a_run_on_conversations_ends_with_how_to_talk(tmp_path, capsys):
  data = DataConfig(source='conversations', paths='x')
  found = said(tmp_path, capsys, figures=False, data=data)
  assert found['sample from it'].endswith(f'--checkpoint={tmp_path}/9 --chat')


def test_many_skipped_files_are_counted_and_some_named(tmp_path, capsys):
  skipped = {f'{i:03d}.txt': 'empty' for i in range(40)}
  found = said(tmp_path, capsys, skipped=skipped.items(), figures=False)
  text = found['skipped files']
  assert text.startswith('40: 000.txt (empty), 001.txt (empty), ')
  assert text.endswith(' and 30 more')
  one = said(tmp_path, capsys, skipped=[('a', 'empty')], figures=False)
  assert one['skipped files'] == '1: a (empty)'


@pytest.mark.parametrize('block', ['figures', 'metrics.jsonl'])
def test_figures_that_cannot_be_drawn_cost_only_the_figures(
  tmp_path, capsys, block
):
  if block == 'figures':
    (tmp_path / block).write_text('in the way')
  else:
    (tmp_path / block).mkdir()
  found = said(tmp_path, capsys)
  assert found['figures'].startswith('none: ')
  assert block in found['figures']
  assert found['checkpoint'] == f'{tmp_path}/9'


@pytest.mark.parametrize(
  ('source', 'sample'),
  [
    (DataConfig(), "'--prompt=The '"),
    (DataConfig(source='synthetic'), 'n/a: nothing says which text'),
  ],
)
def test_a_prompt_is_only_suggested_where_the_data_is_text(
  tmp_path, capsys, source, sample
):
  found = said(tmp_path, capsys, prompt='', figures=False, data=source)
  assert sample in found['sample from it']


def test_a_run_from_python_is_told_how_to_go_on_there(tmp_path, capsys):
  found = said(tmp_path, capsys, command='', figures=False)
  assert found['resume it'] == (
    'gated_jax.training.loop.run(config, workdir) with config.steps=2000 and '
    'the same workdir'
  )
  assert found['sample from it'].startswith('python -m gated_jax.decode ')


def test_figures_table_and_settings_are_one_page_that_fetches_nothing(
  tmp_path, capsys
):
  pytest.importorskip('matplotlib')
  said_of_run = said(tmp_path, capsys, seed=7, export_as='<b>')
  path = tmp_path / 'figures/report.html'
  assert said_of_run['all on one page'] == str(path)
  text = path.read_text()
  images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
  figures = [
    (tmp_path / 'figures' / name).read_bytes()
    for name in ('sink.png', 'activation.png')
  ]
  assert [base64.b64decode(image) for image in images] == figures
  assert not re.search(r'(?:src|href)="(?!data:|#)', text)
  places = re.findall(r'href="#([^"]+)"', text)
  assert places == ['sink', 'activation', 'settings']
  assert all(f' id="{place}"' in text for place in places)
  assert "default-src 'none'" in text
  assert '<td>validation loss</td><td>2.0000 nats per token</td>' in text
  assert '<tr><td>seed</td><td>7</td></tr>' in text
  assert '&lt;b&gt;' in text
  assert '<b>' not in text
  assert '<td>steps</td>' not in text, 'a default'


def test_a_page_that_cannot_be_written_costs_only_the_page(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  (tmp_path / 'figures/report.html').mkdir(parents=True)
  said_of_run = said(tmp_path, capsys)
  assert said_of_run['all on one page'].startswith('none: ')
  assert 'sink.png' in said_of_run['figures']
  assert said_of_run['checkpoint'] == f'{tmp_path}/9'
