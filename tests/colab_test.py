"""The notebooks run top to bottom, and show something."""

import ast
import base64
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
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


def test_there_are_four_notebooks():
  assert NAMES == [
    'attention_sinks',
    'gate_in_ten_minutes',
    'train_and_sample',
    'tune_in_colab',
  ]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  'path',
  [
    # What the others do has examples that are tested.
    path
    if path.stem == 'gate_in_ten_minutes'
    else pytest.param(path, marks=pytest.mark.nightly)
    for path in NOTEBOOKS
  ],
  ids=NAMES,
)
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


SHOWS = re.compile(r'^ *(?:pyplot\.show\(\)|display\()', re.MULTILINE)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=NAMES)
def test_every_figure_has_a_caption_and_the_end_says_what_to_try_next(path):
  cells = read(path).cells
  after = [
    cells[i + 1].source
    for i, cell in enumerate(cells)
    if cell.cell_type == 'code' and SHOWS.search(cell.source)
  ]
  assert len(after) >= 2
  for number, text in enumerate(after, 1):
    assert text.startswith(f'*Figure {number}. ') and text.endswith('*')
  assert '## What to try next\n\n- ' in cells[-1].source


def first_cell(path):
  return code_cells(read(path))[0].source


def load_address():
  """docs/site/address.py, which belongs to no package."""
  path = ROOT / 'docs/site/address.py'
  spec = importlib.util.spec_from_file_location('address', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_file_tells_the_address_of_setup_py():
  stale = [
    path.name
    for path, text in load_address().expected().items()
    if path.read_text() != text
  ]
  assert stale == [], 'run: python docs/site/address.py'


ADDRESS = 'https://github.com/owner/gated'


@pytest.fixture
def with_an_address(tmp_path):
  """A copy of what tells the address, by a setup.py that has one."""
  address = load_address()
  for name in (*address.PAGES, 'CITATION.cff', 'setup.py'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = (ROOT / name).read_text()
    text = text.replace("\nREPOSITORY = ''", f'\nREPOSITORY = {ADDRESS!r}')
    (tmp_path / name).write_text(text)
  shutil.copytree(ROOT / 'colab', tmp_path / 'colab')
  for path, text in address.expected(tmp_path).items():
    path.write_text(text)
  return tmp_path


def test_one_line_puts_the_address_everywhere(with_an_address):
  readme = (with_an_address / 'README.md').read_text()
  assert f'git clone {ADDRESS} ' in readme
  assert f'git+{ADDRESS}' in readme
  assert f'git+{ADDRESS}' in (with_an_address / 'docs/install.md').read_text()
  citation = (with_an_address / 'CITATION.cff').read_text()
  assert f'\nrepository-code: {ADDRESS}\n' in citation
  for name in NAMES:
    path = with_an_address / f'colab/{name}.ipynb'
    assert f'REPOSITORY = {ADDRESS!r}' in first_cell(path)


def test_a_badge_opens_its_own_notebook(with_an_address):
  for name in NAMES:
    title = read(with_an_address / f'colab/{name}.ipynb').cells[0].source
    target = f'github/owner/gated/blob/main/colab/{name}.ipynb)'
    assert title.count('Open in Colab') == 1
    assert title.startswith('[![Open in Colab](') and target in title


def test_what_is_no_address_of_github_has_no_badge(with_an_address):
  setup = with_an_address / 'setup.py'
  setup.write_text(setup.read_text().replace(ADDRESS, 'https://host/gated'))
  files = load_address().expected(with_an_address)
  assert 'git clone https://host/gated ' in files[with_an_address / 'README.md']
  assert not any('Open in Colab' in text for text in files.values())


COLAB = {'COLAB_JUPYTER_IP': '127.0.0.1', 'KMP_TARGET_PORT': '9'}
OPENED = 'fileId=https%3A//github.com/owner/gated/blob/main/colab/a.ipynb'
TPU = {'TPU_ACCELERATOR_TYPE': 'v5e-1'}
WHEEL = 'gated_jax-0.1.0-py3-none-any.whl'


@dataclasses.dataclass(frozen=True)
class Machine:
  """What the install cell sees around it, and what it should ask pip for."""

  wanted: tuple[str, ...]
  repository: str = ''
  environment: dict[str, str] = dataclasses.field(default_factory=dict)
  smi: str = ''
  files: tuple[str, ...] = ()
  installed: tuple[str, ...] = ('jax', 'jaxlib')


MACHINES = {
  'clone below': Machine(('{here}/gated_jax',), files=('gated_jax/gated_jax/__init__.py',)),
  'clone above': Machine(('{here}/..',), files=('../gated_jax/__init__.py',)),
  'wheel': Machine((f'{{here}}/{WHEEL}',), files=(WHEEL, 'gated_jax-0.1.0.tar.gz')),
  'sdist': Machine(('{here}/gated_jax-0.1.0.tar.gz',), files=('gated_jax-0.1.0.tar.gz',)),
  'address': Machine(('git+https://host/x',), repository='https://host/x'),
  'colab': Machine((f'git+{ADDRESS}',), environment=COLAB),
  'gpu': Machine(('git+https://host/x', 'jax[cuda12]'), 'https://host/x', smi='CUDA Version: 12.4'),
  'gpu of colab': Machine(
    ('git+https://host/x', 'jax[cuda12]'), 'https://host/x', smi='CUDA Version: 13.0',
    installed=('jax', 'jax-cuda12-plugin'),
  ),
  'tpu': Machine(('git+https://host/x', 'jax[tpu]'), 'https://host/x', environment=TPU),
}  # fmt: skip


@pytest.fixture
def machine(request, tmp_path, monkeypatch):
  """The program of the install cell, and the words that pip would be given."""
  seen = request.param
  commands, limits = [], []

  def pretend(command, **options):
    del options
    if command[0] == 'nvidia-smi':
      if not seen.smi:
        raise FileNotFoundError
      return subprocess.CompletedProcess(command, 0, stdout=seen.smi)
    assert command[:5] == [sys.executable, '-m', 'pip', 'install', '-q']
    commands.append(command[5:])
    limits.append(pathlib.Path(command[6]).read_text())
    return subprocess.CompletedProcess(command, 0)

  def answer(url):
    assert url == 'http://127.0.0.1:9/api/sessions'
    text = json.dumps([{'path': OPENED}]).encode()
    return contextlib.closing(io.BytesIO(text))

  def version(name):
    if name not in seen.installed:
      raise importlib.metadata.PackageNotFoundError
    return '0.12.0+local'

  here = tmp_path / 'work'
  for file in seen.files:
    (here / file).parent.mkdir(parents=True, exist_ok=True)
    (here / file).touch()
  here.mkdir(exist_ok=True)
  monkeypatch.chdir(here)
  for name in (*COLAB, *TPU):
    monkeypatch.delenv(name, raising=False)
  for name, value in seen.environment.items():
    monkeypatch.setitem(os.environ, name, value)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(importlib.metadata, 'version', version)
  monkeypatch.setattr(subprocess, 'run', pretend)
  monkeypatch.setattr(urllib.request, 'urlopen', answer)
  source = (ROOT / 'colab/install_cell.py').read_text()
  source = source.replace(
    "REPOSITORY = ''", f'REPOSITORY = {seen.repository!r}'
  )
  program = compile(source, 'first cell', 'exec')
  wanted = [word.format(here=here) for word in seen.wanted]
  return program, wanted, commands, limits


@pytest.mark.parametrize(
  'machine', MACHINES.values(), ids=MACHINES, indirect=True
)
def test_installs_what_is_missing(machine, capsys):
  program, (place, *others), commands, limits = machine
  exec(program, {})
  if '://' not in place:
    place = pathlib.Path(place).resolve().as_uri()
  ((flag, _, *wanted),) = commands
  assert (flag, wanted) == ('-c', [f'gated_jax[hf,plot] @ {place}', *others])
  assert 'jax>=0.12.0' in limits[0].splitlines()  # pip knows no >= of +local
  assert 'jax 0.12.0+local, as it was' in capsys.readouterr().out


@pytest.mark.parametrize('machine', [Machine(())], indirect=True)
def test_where_nothing_is_at_hand_it_says_what_to_do(machine):
  program, _, commands, _ = machine
  with pytest.raises(ValueError, match='Upload its wheel, clone it, or set'):
    exec(program, {})
  assert commands == []


def test_a_jax_beyond_the_bounds_is_kept_and_what_else_is_missing_comes(
  tmp_path, monkeypatch, capsys
):
  commands = []

  def pretend(command, **options):
    commands.append(command[3:])
    refused = any('gated_jax[' in word for word in command)
    conflict = 'gated-jax 0.1.0 has requirement jax<0.13, but you have 0.14.'
    return subprocess.CompletedProcess(command, refused, stdout=conflict)

  needs = ['jax<0.13', 'flax', 'optax>=0.2', 'matplotlib; extra == "plot"', 'pytest; extra == "dev"']  # fmt: skip
  (tmp_path / WHEEL).touch()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.14.0')
  monkeypatch.setattr(importlib.metadata, 'requires', lambda name: needs)
  monkeypatch.setattr(subprocess, 'run', pretend)
  exec((ROOT / 'colab/install_cell.py').read_text(), {})
  _, alone, others, _ = commands
  assert alone == ['install', '-q', '--no-deps', str(tmp_path / WHEEL)]
  assert others[-2:] == ['optax>=0.2', 'matplotlib']
  assert 'has requirement jax<0.13' in capsys.readouterr().out


def test_a_folder_of_the_same_name_is_no_installed_package(
  tmp_path, monkeypatch
):
  (tmp_path / 'gated_jax').mkdir()
  source = (ROOT / 'colab/install_cell.py').read_text()
  done = subprocess.run(
    [sys.executable, '-S', '-c', source],
    cwd=tmp_path,
    env={'PATH': '/nowhere'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'ValueError: gated_jax is not here' in done.stderr
