"""Exit codes, and one line for every error."""

import copy as copylib
import importlib
import subprocess
import sys

import jax
import pytest
from absl import flags

from gated_jax import cli
from gated_jax import config_flag


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


class HttpError(Exception):
  __module__ = 'gcsfs.retry'
  code = 503


@pytest.mark.parametrize(
  ('error', 'words', 'code'),
  [
    (HttpError('busy\n503'), 'the request failed, after several tries', 75),
    (OSError('Forbidden: b/x\nno way'), 'no permission: b/x no way', 2),
  ],
)
def test_what_a_buckets_library_raises_is_a_line(error, words, code, capsys):
  assert cli.run(raising(error)) == code
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith(f'error: a bucket: {words}')
  assert err.count('\n') == 1


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


POD = ['--config=configs/smoke.py', '--topology=v5e:16x16']
WRONG = [
  ('decode.bench', ['--batch=0'], "argument --batch: '0' must be a positive"),
  ('decode.bench', ['--rounds=x'], "--rounds: 'x' must be a positive number"),
  ('decode.bench', ['--dtype=f'], "model.dtype='f' must be one of bfloat16"),
  (
    'bench.__main__',
    ['data', '--rounds=0'],
    "--rounds: '0' must be a positive",
  ),
  ('aot.kernels', ['--length=-1'], "--length: '-1' must be a positive number"),
  ('aot.attention', ['--gates=no'], '--gates=no must be of: none'),
  ('aot.layer', ['--target=tpu'], "--target: invalid choice: 'tpu'"),
  ('data.__main__', ['look'], '--config is missing'),
  ('data.__main__', ['look', '--rows=0'], "--rows: '0' must be a positive"),
  ('data.__main__', ['tokenize', '--out=x', '--no'], 'arguments: --no'),
  ('aot.__main__', ['aot'], '--config is missing'),
  (
    'aot.__main__',
    ['aot', '--config=no.py'],
    "there is no config file 'no.py'",
  ),
  ('aot.__main__', ['aot', *POD, '--minutes=nan'], '--minutes=nan must be pos'),
  ('aot.__main__', ['aot', *POD, '--text=no/x'], 'there is no folder no'),
  (
    'aot.__main__',
    ['aot', *POD, '--config.model.widht=1'],
    'did you mean --config.model.width?',
  ),
]


@pytest.mark.parametrize(('module', 'words', 'message'), WRONG)
def test_no_command_answers_a_wrong_word_with_a_traceback(
  module, words, message, capsys, monkeypatch
):
  program = importlib.import_module(f'gated_jax.{module}')
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  monkeypatch.setattr(config_flag, 'FLAGS', fresh_flags())
  monkeypatch.setattr(program, 'FLAGS', config_flag.FLAGS, raising=False)
  assert program.main(words) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('error: ') and err.count('\n') == 1
  assert message in err


LOSSES = [
  ('', None),
  ("def get_loss(words): return {'a': len}[words]", len),
  ('get_loss = 3', 'get_loss=3, which is no function'),
  ('def get_loss(words): return words', "made 'a', which is no function"),
  ('def get_loss(words): return {}[words]', "failed: KeyError: 'a'"),
]


@pytest.mark.parametrize(('text', 'expected'), LOSSES)
def test_a_config_file_may_bring_a_loss(text, expected, tmp_path, monkeypatch):
  file = tmp_path / 'mine.py'
  config = 'from configs import base\ndef get_config(words):\n'
  file.write_text(f'{config}  return base.get_config()\n{text}\n')
  monkeypatch.setattr(config_flag, 'FLAGS', fresh_flags())
  config_flag.read(['x', f'--config={file}:a'], '')

  def made():
    maker = config_flag.loss_maker()
    return maker and maker()

  if not isinstance(expected, str):
    assert made() is expected
    return
  with pytest.raises(ValueError, match=expected) as error:
    made()
  assert '\n' not in str(error.value)


def fresh_flags():
  """What a new process has: absl's flags remember what was typed before."""
  copy = flags.FlagValues()
  copy.append_flag_values(flags.FLAGS)
  copy = copylib.deepcopy(copy)
  copy.unparse_flags()
  return copy


PRINT = """
import sys
from gated_jax import cli
def program():
  for i in range(100_000):
    print(i)
sys.exit(cli.run(program))
"""


@pytest.mark.parametrize(
  'code',
  ['| head -1', '>/dev/full', pytest.param('>&-', marks=pytest.mark.long)],
)
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
