"""The command line: a mistake costs one line and exit code 2."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = '--config=configs/smoke.py'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([SMOKE], '--workdir is missing'),
    (['--workdir=W'], '--config is missing'),
    ([SMOKE, '--workdir=gs://b/r'], '--workdir=gs://b/r must be a folder'),
    (['--config=configs/nope.py', '--workdir=W'], "'configs/nope.py'"),
    (['--config', 'configs/nope.py', '--workdir=W'], "'configs/nope.py'"),
    (
      ['--config', 'configs/smoke.py', '--config.stpes', '3'],
      '--config.stpes; did you mean --config.steps?',
    ),
    (['--config=B', '--workdir=W'], 'broken.py failed: ZeroDivisionError: '),
    (
      ['--config=configs/gate_sweep.py:nope', '--workdir=W'],
      "error: row 'nope' must be one of: baseline kv_heads_8",
    ),
    (
      ['--config=configs/smoke.py:a', '--workdir=W'],
      'smoke.py failed: TypeErr',
    ),
    ([SMOKE, '--wrkdir=W'], "'wrkdir'. Did you mean: workdir"),
    ([SMOKE, '--workdir=W', 'steps=3'], "'steps=3' is not a flag"),
    (
      [SMOKE, '--workdir=W', '--config.stpes=3'],
      '--config.stpes; did you mean --config.steps?',
    ),
    (
      [SMOKE, '--workdir=W', '--config.model.widht=3'],
      'did you mean --config.model.width?',
    ),
    ([SMOKE, '--workdir=W', '--config.steps=many'], "'many'"),
    ([SMOKE, '--workdir=W', '--config.model.heads=3'], 'model.heads=3 must'),
    (
      [SMOKE, '--workdir=/proc/nowhere/W', '--config.figures=False'],
      'cannot write to workdir /proc/nowhere/W',
    ),
    (
      [SMOKE, '--workdir=W', '--config.data.length=4096'],
      'data.length=4096 is longer than the model.length=256',
    ),
  ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
  (tmp_path / 'broken.py').write_text('def get_config():\n  return 1 / 0\n')
  arguments = [
    x.replace('=W', f'={tmp_path / "run"}').replace(
      '=B', f'={tmp_path / "broken.py"}'
    )
    for x in arguments
  ]
  found = subprocess.run(
    [sys.executable, 'train.py', *arguments],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 2, found.stderr
  (line,) = found.stderr.splitlines()
  assert line.startswith('error: ')
  assert message in line
  assert not found.stdout


def test_help_is_help():
  found = subprocess.run(
    [sys.executable, 'train.py', '--help'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr
  assert '--config=configs/smoke.py' in found.stdout
  assert '--workdir: Folder of the run' in found.stdout
