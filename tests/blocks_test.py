"""Every code block of README, CONTRIBUTING and docs/ is tried.

Python runs as it is printed. Every command is read by the program that it
calls, with its config, up to where work would begin; shell is read by bash.
Commands that a small model can follow also run (`long`); for the others
`TRIED_ELSEWHERE` names the tests of their programs, or why there are none.
"""

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import config_flag
from gated_jax.config import DataConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.hf import convert
from gated_jax.model.abstract import abstract_parameters

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted((ROOT / 'docs').glob('*.md'))


@dataclasses.dataclass(frozen=True)
class Block:
  """A stretch of code on a page."""

  page: str
  line: int
  language: str  # the word behind ```, or 'indented'
  needed: str  # a package that not everybody has
  text: str

  def __str__(self):
    return f'{self.page}:{self.line}'


def blocks_of(page):
  """Fenced and indented blocks, in order."""
  lines = page.read_text().splitlines()
  place = 0
  while place < len(lines):
    begin, line = place, lines[place]
    place += 1
    if line.startswith('```'):
      while not lines[place].startswith('```'):
        place += 1
      language, _, needed = line.strip('` ').partition(' ')
      text = '\n'.join(lines[begin + 1 : place])
      place += 1
    elif line.startswith('    ') and not (lines[begin - 1] if begin else ''):
      while place < len(lines) and lines[place].startswith(('    ', '\n')):
        place += 1
      language, needed = 'indented', ''
      text = '\n'.join(one[4:] for one in lines[begin:place])
    else:
      continue
    yield Block(page.name, begin + 1, language, needed, text)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == 'python']
SHELL_WORDS = re.compile(
  r'(?:\S*python|\S*pip|git|mkdocs|ruff|gcloud|taskset|srun|all|for|while'
  r'|export|code=|#SBATCH|\.ci/run|JAX_PLATFORMS=)'
)


def is_shell(block):
  return block.language == 'bash' or (
    block.language in ('', 'indented') and SHELL_WORDS.match(block.text)
  )


def is_flags(block):
  return block.language == 'indented' and block.text.startswith('--')


def is_json(block):
  return block.language == 'indented' and block.text.startswith('{')


SHELL = [block for block in BLOCKS if is_shell(block)]
FLAGS = [block for block in BLOCKS if is_flags(block)]
JSON = [block for block in BLOCKS if is_json(block)]


def test_what_is_no_code_is_little_and_calls_nothing():
  others = [b for b in BLOCKS if b not in PYTHON + SHELL + FLAGS + JSON]
  # Equations, maps of folders, a citation.
  assert {b.language for b in others} <= {'indented', 'text'}
  calls = [str(b) for b in others if re.search(r'python|pip |import ', b.text)]
  assert calls == [str(the_map())]
  assert len(PYTHON) >= 12 and len(SHELL) >= 50


def the_map():
  (block,) = (b for b in BLOCKS if 'flags -> RunConfig' in b.text)
  return block


# A small model under each name that a page gives to a run or an import.
OURS = ('runs/smoke', 'runs/imported', 'runs/a', 'runs/b', 'runs/gated')
OURS += ('runs/ungated', 'runs/mine', 'runs/lora', 'path/of/ours')
OURS += ('path/of/either', 'models/mine')
THEIRS = 'path/of/theirs'
MODEL = ModelConfig(
  vocab=320,
  length=64,
  depth=2,
  width=16,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=16,
  dtype='float32',
  scan=False,
)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A folder in which the names that the pages use are there."""
  folder = tmp_path_factory.mktemp('pages')
  rng = np.random.default_rng(0)
  params = {
    path: rng.normal(size=x.shape).astype(x.dtype) * 0.3
    for path, x in _leaves(abstract_parameters(MODEL))
  }
  tree = _unflatten(params)
  data = DataConfig(source='stdlib', length=64, batch=2, rows='joined')
  run = RunConfig(model=MODEL, data=data, eval_batches=1)
  checkpoint.save_parameters(folder / 'saved/checkpoints/5', tree, run)
  log = [{'step': s, 'loss': 3.0 / s, 'tokens_per_second': 9.0} for s in (1, 2)]
  text = ''.join(json.dumps(line) + '\n' for line in log)
  for name in OURS:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / 'saved', folder / name)
    (folder / name / 'metrics.jsonl').write_text(text)
  convert.save(folder / THEIRS, tree, MODEL)
  for name in ('configs', 'docs', 'tests', 'train.py'):
    (folder / name).symlink_to(ROOT / name)
  return folder


def _leaves(tree, path=()):
  for name, value in tree.items():
    if hasattr(value, 'shape'):
      yield (*path, name), value
    else:
      yield from _leaves(value, (*path, name))


def _unflatten(params):
  tree = {}
  for path, value in params.items():
    place = tree
    for name in path[:-1]:
      place = place.setdefault(name, {})
    place[path[-1]] = value
  return tree


# What takes more than a few seconds.
SLOW = ("decode.load('runs/smoke'",)


@pytest.mark.parametrize('block', [
  pytest.param(b, id=str(b), marks=pytest.mark.long)
  if any(word in b.text for word in SLOW)
  else pytest.param(b, id=str(b))
  for b in PYTHON
])  # fmt: skip
def test_python_runs(block, small, monkeypatch, tmp_path):
  if block.needed:
    pytest.importorskip(block.needed)
  monkeypatch.chdir(tmp_path)
  for path in small.iterdir():
    (tmp_path / path.name).symlink_to(path)
  if block.needed == 'lm_eval':
    only_local_tasks(monkeypatch, tmp_path)
  exec(compile(block.text, str(block), 'exec'), {'__name__': 'page'})


def only_local_tasks(monkeypatch, folder):
  """The harness with a question from a file in place of a task on the hub."""
  import lm_eval

  real = lm_eval.simple_evaluate
  line = {
    'question': 'an ox eats',
    'choices': [' grass', ' stone'],
    'answer': 0,
  }
  (folder / 'questions.json').write_text(json.dumps(line) + '\n')
  task = {
    'task': 'local',
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(folder / 'questions.json')}},
    'test_split': 'test',
    'output_type': 'multiple_choice',
    'doc_to_text': '{{question}}',
    'doc_to_target': '{{answer}}',
    'doc_to_choice': '{{choices}}',
    'metric_list': [{'metric': 'acc'}],
  }

  def simple_evaluate(model, tasks):
    assert tasks == ['hellaswag']
    return real(model=model, tasks=[task])

  monkeypatch.setattr(lm_eval, 'simple_evaluate', simple_evaluate)


@pytest.mark.parametrize('block', JSON, ids=str)
def test_json_is_json(block):
  assert all(isinstance(json.loads(x), dict) for x in block.text.splitlines())


@pytest.mark.parametrize('block', FLAGS, ids=str)
@pytest.mark.usefixtures('fresh_flags')
def test_flags_are_settings(block, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = shlex.split(block.text.replace('\\\n', ''))
  before = RunConfig()
  assert read_config(words) != before


@pytest.mark.parametrize('block', SHELL, ids=str)
def test_bash_can_read_it(block):
  done = subprocess.run(
    ['bash', '-n', '-c', block.text.replace('[FLAGS]', '')],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


# What a reader puts in the place of these words.
STAND_FOR = {
  'NAME-S': 'headwise-0',
  '=S ': '=0 ',
  '[FLAGS]': '',
  ' ...': ' --config=configs/smoke.py --workdir=runs/new',
  '$TEXT': '',
  '$RUN': 'runs/smoke',
  '$least': '400',
  '$most': '1600',
  '$name': 'short',
}
CALL = re.compile(
  r'python3? +(?:-m +(?P<module>\S+)|(?P<file>\S+\.py))(?P<words>[^"&|;\n]*)'
)


def calls_of(block):
  """The Python programs that a block calls, each with its words."""
  text = re.sub(r'\\\n\s*', '', block.text)
  # Comments, and commands that only name a program to end it.
  text = re.sub(r' +# .*|.*pkill .*', '', text)
  for word, meant in STAND_FOR.items():
    text = text.replace(word, meant)
  for call in CALL.finditer(text):
    words = shlex.split(call['words'].split(' 2>')[0])
    yield call['module'] or call['file'], words


CALLS = [
  pytest.param(program, words, id=f'{block}-{program}')
  for block in SHELL
  for program, words in calls_of(block)
  if not block.text.startswith('pre-commit')
]
# Programs of others, and those of the house that take no words.
OF_OTHERS = ('venv', 'pip', 'uv', 'pytest')


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
      read_config(rest)
    raise Understood

  with monkeypatch.context() as patch:
    patch.setattr(cli.Parser, 'parse_known_args', parse_known_args)
    yield


def read_config(words):
  """The settings that words make, on those of the smoke config."""
  return config_flag.read(['x', '--config=configs/smoke.py', *words], '')


@pytest.fixture
def fresh_flags(monkeypatch):
  """absl's flags as a new process has them: they remember what was typed."""
  modules = [config_flag, importlib.import_module('train')]
  modules.append(importlib.import_module('gated_jax.aot.__main__'))
  fresh = flags.FlagValues()
  for name in flags.FLAGS:
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
  if program in ('train.py', 'gated_jax.train'):
    if not any(word.startswith('--help') for word in words):
      train.read_flags(['train.py', *words])
    return
  if program == 'gated_jax.aot':
    aot = importlib.import_module('gated_jax.aot.__main__')
    aot.read_flags(['aot', *words])
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
