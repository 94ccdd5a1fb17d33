"""What a user has who has no checkout: a wheel, its types, its trainer."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from gated_jax.train.__main__ import home
from gated_jax.train.__main__ import with_path

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'

USER = """\
import jax
import jax.numpy as jnp
from flax import nnx

from gated_jax import GatedAttention
from gated_jax.nnx import GatedAttention as NnxAttention

x = jnp.ones((1, 4, 8))
right = GatedAttention(num_heads=2, gate='headwise')
y: jax.Array = right(x)
GatedAttention(num_heads=2, gate='hedwise')
number: int = right(x)
NnxAttention(2, 8, gate='hedwise', rngs=nnx.Rngs(0))
"""


@pytest.mark.parametrize(('argument', 'expected'), [
  ('--config=smoke', f'--config={CONFIGS}/smoke.py'),
  ('--config=gate_sweep:headwise', f'--config={CONFIGS}/gate_sweep.py:headwise'),
  ('--config=own/smoke.py', '--config=own/smoke.py'),
  ('--config=smoke.py', '--config=smoke.py'),
  ('--config.steps=2', '--config.steps=2'),
  ('--workdir=smoke', '--workdir=smoke'),
])  # fmt: skip
def test_a_word_means_a_config_of_the_package(argument, expected):
  assert with_path(argument, CONFIGS) == expected


def test_a_word_that_means_none_is_refused():
  with pytest.raises(ValueError, match=r'--config=smok is neither .* smoke'):
    with_path('--config=smok', CONFIGS)


def test_in_a_checkout_the_trainer_is_that_of_the_checkout():
  assert home() == ROOT


def run(folder, *command, path):
  environment = {**os.environ, 'PYTHONPATH': path, 'MYPYPATH': path}
  environment.pop('XLA_FLAGS')  # one device
  return subprocess.run(
    [sys.executable, '-m', *map(str, command)],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )


@pytest.mark.parametrize(
  'checker', [pytest.param('mypy', marks=pytest.mark.long), 'basedpyright']
)
def test_a_checker_catches_a_mistyped_gate(tmp_path, checker):
  pytest.importorskip(checker)
  (tmp_path / 'user.py').write_text(USER)
  (tmp_path / 'pyrightconfig.json').write_text(
    '{"typeCheckingMode": "standard"}'
  )
  python = {'mypy': '--python-executable', 'basedpyright': '--pythonpath'}
  where = (python[checker], sys.executable)
  done = run(tmp_path, checker, *where, 'user.py', path=str(ROOT))
  lines = re.findall(r'user\.py:(\d+):\S* (?:- )?error', done.stdout)
  assert lines == ['11', '12', '13'], done.stdout


@pytest.mark.long
def test_a_wheel_trains_in_an_empty_folder(tmp_path):
  source = tmp_path / 'source'
  for folder in ('gated_jax', 'configs', 'docs', 'tests'):
    shutil.copytree(ROOT / folder, source / folder)
  for name in (
    'setup.py',
    'pyproject.toml',
    'README.md',
    'train.py',
    'LICENSE',
    'MANIFEST.in',
  ):
    shutil.copy(ROOT / name, source)
  # The wheel is made of the sdist, so that both are tried.
  built = run(source, 'build', '--outdir', tmp_path, path='')
  assert list(tmp_path.glob('*.tar.gz')), built.stderr
  wheels = list(tmp_path.glob('*.whl'))
  assert wheels, built.stderr
  with zipfile.ZipFile(wheels[0]) as wheel:
    wheel.extractall(tmp_path / 'site')
  settings = (
    'steps=2',
    'optimizer.warmup_steps=1',
    'model.depth=1',
    'data.batch=2',
    'data.length=64',
    'eval_batches=1',
  )
  small = [f'--config.{setting}' for setting in settings]
  empty = tmp_path / 'empty'
  empty.mkdir()
  program = ('gated_jax.train', '--config=smoke', '--workdir=run', *small)
  done = run(empty, *program, path=str(tmp_path / 'site'))
  assert done.returncode == 0, done.stderr
  assert 'validation' in done.stdout + done.stderr
  shutil.copy(ROOT / 'docs/examples/linen_model.py', empty / 'model.py')
  done = run(empty, 'model', path=str(tmp_path / 'site'))
  assert done.returncode == 0, done.stderr
