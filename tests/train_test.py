"""The command line: a mistake costs one line and exit code 2."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = '--config=configs/smoke.py'


MISTAKES = [
  ([SMOKE], '--workdir is missing'),
  (['--workdir=W'], '--config is missing'),
  ([SMOKE, '--workdir=hdfs://b/r'], 'nothing is known of hdfs://'),
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
]
# One interpreter that has imported everything, and a copy of it for each case.
FORKS = """
import json, os, sys
import train
found = []
for argv in json.loads(sys.argv[1]):
  files = [os.memfd_create(name) for name in ('out', 'err')]
  child = os.fork()
  if not child:
    for stream, file in zip((1, 2), files):
      os.dup2(file, stream)
    sys.argv = ['train.py', *argv]  # ml_collections looks there
    code = train.main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  texts = [os.pread(file, 1 << 20, 0).decode() for file in files]
  found.append((code, *texts))
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def mistakes(tmp_path_factory):
  """Exit code, output and errors of every case of MISTAKES."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'broken.py').write_text('def get_config():\n  return 1 / 0\n')

  def real(argument):
    argument = argument.replace('=W', f'={folder / "run"}')
    return argument.replace('=B', f'={folder / "broken.py"}')

  cases = [[real(x) for x in arguments] for arguments, _ in MISTAKES]
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', FORKS, json.dumps(cases)],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  'number', range(len(MISTAKES)), ids=[message for _, message in MISTAKES]
)
def test_a_mistake_is_one_line(mistakes, number):
  code, out, err = mistakes[number]
  assert code == 2, err
  (line,) = err.splitlines()
  assert line.startswith('error: ')
  assert MISTAKES[number][1] in line
  assert not out


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
  assert '--config.steps=1000' in found.stdout


def test_help_of_a_group_shows_its_settings(capsys):
  import train

  assert train.main(['train.py', '--help=optimizer']) == 0
  assert '--config.optimizer.learning_rate=0.0003' in capsys.readouterr().out
  assert train.main(['train.py', '--help=optimiser']) == 2
  assert 'did you mean optimizer?' in capsys.readouterr().err
