"""Exit codes, and one line for every error."""

import subprocess
import sys

import pytest

from gated_jax import cli


def raising(error):
  def program():
    raise error

  return program


@pytest.mark.parametrize(
  ('error', 'code'),
  [
    (ValueError('no'), 2),
    (NotImplementedError('no'), 2),
    (ImportError('no'), 2),
    (OSError('no'), 1),
    (RuntimeError('no'), 1),
    (cli.TryLater('no'), 75),
  ],
)
def test_an_error_is_a_line_and_a_code(error, code, capsys):
  assert cli.run(raising(error)) == code
  assert capsys.readouterr() == ('', 'error: no\n')


def test_what_a_program_returns_is_its_code():
  assert cli.run(lambda: None) == 0
  assert cli.run(lambda: 75) == 75
  assert cli.run(raising(KeyboardInterrupt())) == 130


def test_errors_are_raised_where_their_place_is_wanted():
  with pytest.raises(ValueError, match='no'):
    cli.run(raising(ValueError('no')), debug=True)
  # Messages of many lines that others wrote say little without their place.
  with pytest.raises(RuntimeError, match='one'):
    cli.run(raising(RuntimeError('one\ntwo')))


def test_a_wrong_command_line_is_one_line(capsys):
  parser = cli.Parser(prog='x')
  assert cli.run(lambda: parser.parse_args(['--nope'])) == 2
  assert capsys.readouterr().err == 'error: unrecognized arguments: --nope\n'


PRINT = """
import sys
from gated_jax import cli
def program():
  for i in range(100_000):
    print(i)
sys.exit(cli.run(program))
"""


@pytest.mark.parametrize('code', ['| head -1', '>/dev/full', '>&-'])
def test_an_output_that_ends_is_no_traceback(code):
  done = subprocess.run(
    f'{sys.executable} -c "$PROGRAM" {code}',
    shell=True,
    env={
      'PROGRAM': PRINT,
      'PYTHONPATH': ':'.join(sys.path),
      'PATH': '/bin:/usr/bin',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'Traceback' not in done.stderr
  assert 'Exception' not in done.stderr
