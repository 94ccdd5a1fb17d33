"""Every command of the pages is understood by the program that it calls.

The program reads its words, config and all, up to where work would begin. What
asks something of a cloud is only read by bash (code_test.py). Read run_test.py
for the commands that also run.
"""

import contextlib
import copy
import importlib
import importlib.util
import pathlib
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from gated_jax import cli
from gated_jax import config_flag
from gated_jax.config import RunConfig
from tests.pages.blocks import FLAGS
from tests.pages.blocks import OF_OTHERS
from tests.pages.blocks import ROOT
from tests.pages.blocks import SHELL
from tests.pages.blocks import calls_of

CALLS = [
  pytest.param(program, words, id=f'{block}-{program}')
  for block in SHELL
  for program, words in calls_of(block)
  if not block.text.startswith('pre-commit')
]


class Understood(Exception):
  """The command line was read to its end."""


@contextlib.contextmanager
def stopping_behind_the_flags(monkeypatch):
  """Programs read their words, and do nothing more."""
  parse = cli.Parser.parse_known_args

  def parse_known_args(self, args=None, namespace=None):
    options, rest = parse(self, args, namespace)
    for path in getattr(options, 'configs', ()):
      assert pathlib.Path(path.partition(':')[0]).is_file()
    if rest:
      assert all(word.startswith('--config') for word in rest), rest
      read_config(rest, patch)
    raise Understood

  with monkeypatch.context() as patch:
    patch.setattr(cli.Parser, 'parse_known_args', parse_known_args)
    yield


def read_config(words, monkeypatch):
  """The settings that words make, on those of the smoke config."""
  argv = ['x', '--config=configs/smoke.py', *words]
  monkeypatch.setattr(sys, 'argv', argv)  # settings are looked up in it
  return config_flag.read(argv, '')


@pytest.fixture
def fresh_flags(monkeypatch):
  """absl's flags as a new process has them: they remember what was typed."""
  modules = [config_flag, importlib.import_module('train')]
  modules.append(importlib.import_module('gated_jax.aot.__main__'))
  fresh = flags.FlagValues()
  # By their names: a short name stands for the same flag.
  known = {flags.FLAGS[name].name for name in flags.FLAGS}
  for name in known:
    if name.partition('.')[0] != 'config':
      fresh[name] = copy.deepcopy(flags.FLAGS[name])
  config_flags.DEFINE_config_file('config', None, '', flag_values=fresh)
  fresh.unparse_flags()
  for module in modules:
    monkeypatch.setattr(module, 'FLAGS', fresh)


def understand(program, words, monkeypatch):
  """Raises where the program would refuse its command line."""
  train = importlib.import_module('train')
  if program == 'gated_jax.train':
    from gated_jax.train.__main__ import with_path

    words = [with_path(word, ROOT / 'configs') for word in words]
  argv = [program, *words]
  monkeypatch.setattr(sys, 'argv', argv)
  if program in ('train.py', 'gated_jax.train'):
    if not any(word.startswith('--help') for word in words):
      train.read_flags(argv)
    return
  if program == 'gated_jax.aot':
    aot = importlib.import_module('gated_jax.aot.__main__')
    aot.read_flags(argv)
    return
  name = program
  if importlib.util.find_spec(name).submodule_search_locations:
    name = f'{program}.__main__'
  module = importlib.import_module(name)
  with (
    stopping_behind_the_flags(monkeypatch),
    pytest.raises(Understood),
  ):
    module.main(words)


@pytest.mark.parametrize(('program', 'words'), CALLS)
@pytest.mark.usefixtures('fresh_flags')
def test_a_command_is_understood(program, words, small, monkeypatch):
  monkeypatch.chdir(small)
  if program in OF_OTHERS:
    paths = [w for w in words if w.startswith('tests/') or w.endswith('.py')]
    assert all((ROOT / path).exists() for path in paths)
    return
  if program.startswith('docs/'):
    assert (ROOT / program).exists() and not words
    return
  understand(program, words, monkeypatch)


@pytest.mark.parametrize('block', FLAGS, ids=str)
@pytest.mark.usefixtures('fresh_flags')
def test_flags_are_settings(block, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = shlex.split(block.text.replace('\\\n', ''))
  before = RunConfig()
  assert read_config(words, monkeypatch) != before
