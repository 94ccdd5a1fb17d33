"""The notebooks run top to bottom, and show something."""

import ast
import base64
import contextlib
import glob
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib import image

from gated_jax.evals import records

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
NAMES = [path.stem for path in NOTEBOOKS]


def read(path):
  return nbformat.read(path, as_version=4)


def code_cells(book):
  return [cell for cell in book.cells if cell.cell_type == 'code']


def pictures(book):
  """Pixels of every image that a notebook shows."""
  for cell in code_cells(book):
    for output in cell.outputs:
      png = output.get('data', {}).get('image/png')
      if png:
        yield image.imread(io.BytesIO(base64.b64decode(png)), format='png')


def run(path, folder, monkeypatch, flags):
  """The notebook with its outputs; an error in a cell is raised."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('XLA_FLAGS', flags)
  book = read(path)
  nbclient.NotebookClient(
    book,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': str(folder)}},
  ).execute()
  return book


def check(book):
  shown = list(pictures(book))
  assert len(shown) >= 2
  for pixels in shown:
    assert np.ptp(pixels[..., :3], axis=(0, 1)).max() > 0.2, 'an empty figure'


def test_there_are_three_notebooks():
  assert NAMES == ['attention_sinks', 'gate_in_ten_minutes', 'train_and_sample']


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_runs_top_to_bottom_and_shows_figures(path, tmp_path, monkeypatch):
  check(run(path, tmp_path, monkeypatch, ''))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_runs_on_eight_devices(path, tmp_path, monkeypatch):
  check(
    run(
      path,
      tmp_path,
      monkeypatch,
      '--xla_force_host_platform_device_count=8',
    )
  )


def test_curves_in_the_notebook_are_those_of_the_repository():
  cells = [
    c.source for c in code_cells(read(ROOT / 'colab/attention_sinks.ipynb'))
  ]
  (cell,) = [text for text in cells if 'MEASURED = ' in text]
  literal = cell[cell.index('MEASURED = ') + 11 : cell.index('\n}') + 2]
  runs = records.read([ROOT / 'docs/figures/evidence/runs.json.gz'])
  for arm, curves in ast.literal_eval(literal).items():
    seeds = [r for r in runs if (r.about['claim'], r.arm) == ('sinks', arm)]
    assert len(seeds) == 3
    for name in ('sink', 'activation'):
      means = [
        [np.mean(probe[name][2:]) for probe in r.probes if probe.get(name)]
        for r in seeds
      ]
      np.testing.assert_allclose(curves[name], np.mean(means, 0), rtol=1e-2)


def test_a_blank_figure_is_found():
  cell = nbformat.v4.new_code_cell()
  buffer = io.BytesIO()
  image.imsave(buffer, np.ones((4, 4, 3)), format='png')
  data = {'image/png': base64.b64encode(buffer.getvalue()).decode()}
  cell.outputs = [nbformat.v4.new_output('display_data', data)] * 2
  with pytest.raises(AssertionError, match='empty figure'):
    check(nbformat.v4.new_notebook(cells=[cell]))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_outputs_are_stripped(path):
  book = read(path)
  nbformat.validate(book)
  for cell in code_cells(book):
    assert not cell.outputs
    assert cell.execution_count is None


def first_cell(path):
  return code_cells(read(path))[0].source


def test_all_begin_with_the_same_cell():
  assert len({first_cell(path) for path in NOTEBOOKS}) == 1


COLAB = {'COLAB_JUPYTER_IP': '127.0.0.1', 'KMP_TARGET_PORT': '9'}
OPENED = 'fileId=https%3A//github.com/owner/gated/blob/main/colab/a.ipynb'
GIT = 'gated_jax[hf,plot] @ git+https://'


@pytest.mark.parametrize(
  ('repository', 'inside', 'environment', 'smi', 'wanted'),
  [
    ('', True, {}, '', [f'{ROOT}[hf,plot]']),
    ('https://host/x', False, {}, '', [f'{GIT}host/x']),
    ('', False, COLAB, '', [f'{GIT}github.com/owner/gated']),
    (
      '',
      False,
      COLAB,
      'CUDA Version: 12.4',
      [f'{GIT}github.com/owner/gated', 'jax[cuda12]'],
    ),
    (
      '',
      False,
      COLAB | {'TPU_ACCELERATOR_TYPE': 'v5e-1'},
      '',
      [f'{GIT}github.com/owner/gated', 'jax[tpu]'],
    ),
    ('', False, {}, '', None),
  ],
  ids=['clone', 'set', 'colab', 'colab gpu', 'colab tpu', 'nowhere'],
)
def test_installs_what_is_missing(
  repository, inside, environment, smi, wanted, tmp_path, monkeypatch
):
  commands = []

  def pretend(command, **options):
    del options
    if command[0] == 'nvidia-smi':
      if not smi:
        raise FileNotFoundError
      return subprocess.CompletedProcess(command, 0, stdout=smi)
    commands.append(command)
    return None

  def answer(url):
    assert url == 'http://127.0.0.1:9/api/sessions'
    text = json.dumps([{'path': OPENED}]).encode()
    return contextlib.closing(io.BytesIO(text))

  monkeypatch.chdir(ROOT / 'colab' if inside else tmp_path)
  for name in (*COLAB, 'TPU_ACCELERATOR_TYPE'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setitem(os.environ, name, value)
  monkeypatch.setattr(glob, 'glob', lambda pattern: [])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(subprocess, 'run', pretend)
  monkeypatch.setattr(urllib.request, 'urlopen', answer)
  source = first_cell(NOTEBOOKS[0])
  assert "REPOSITORY = ''" in source
  source = source.replace("REPOSITORY = ''", f'REPOSITORY = {repository!r}')
  program = compile(source, 'first cell', 'exec')
  if wanted is None:
    with pytest.raises(ValueError, match='set REPOSITORY'):
      exec(program, {})
    assert not commands
    return
  exec(program, {})
  assert commands == [[sys.executable, '-m', 'pip', 'install', '-q', *wanted]]
