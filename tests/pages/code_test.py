"""The code of the pages runs as it is printed, and what is no code is little."""

import json
import re
import subprocess

import pytest

from tests.pages.blocks import BLOCKS
from tests.pages.blocks import FLAGS
from tests.pages.blocks import JSON
from tests.pages.blocks import PYTHON
from tests.pages.blocks import SHELL


def test_what_is_no_code_is_little_and_calls_nothing():
  others = [b for b in BLOCKS if b not in PYTHON + SHELL + FLAGS + JSON]
  # Equations, maps of folders, a citation.
  assert {b.language for b in others} <= {'indented', 'text'}
  calls = [str(b) for b in others if re.search(r'python|pip |import ', b.text)]
  assert calls == []
  assert len(PYTHON) >= 12 and len(SHELL) >= 50


# What takes more than a few seconds, and the page with the most of it.
SLOW = ("decode.load('runs/smoke'", 'vocab=257')
LONG_PAGE = 'modules.md'


@pytest.mark.parametrize('block', [
  pytest.param(b, id=str(b), marks=pytest.mark.long)
  if (any(word in b.text for word in SLOW) or str(b).startswith(LONG_PAGE))
  and not b.needed
  else pytest.param(b, id=str(b))
  for b in PYTHON
])  # fmt: skip
def test_python_runs(block, small, monkeypatch, tmp_path):
  for package in block.needed:
    pytest.importorskip(package)
  monkeypatch.chdir(tmp_path)
  for path in small.iterdir():
    (tmp_path / path.name).symlink_to(path)
  if 'lm_eval' in block.needed:
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


@pytest.mark.parametrize('block', SHELL, ids=str)
def test_bash_can_read_it(block):
  done = subprocess.run(
    ['bash', '-n', '-c', block.text.replace('[FLAGS]', '')],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
