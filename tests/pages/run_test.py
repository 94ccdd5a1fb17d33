"""Commands of the pages run, on a small model.

For those that need a pod's compiler, a GPU, tokens by the million or minutes
`TRIED_ELSEWHERE` names the tests of their programs.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from gated_jax.hf.tokenizer import write_bytes
from tests.pages.blocks import OF_OTHERS
from tests.pages.blocks import ROOT
from tests.pages.blocks import SHELL
from tests.pages.blocks import calls_of

THEIRS = 'path/of/theirs'
# Flags that make a command small; those of a program, and of a subcommand.
SMALLER = {
  'train.py': [
    '--config.steps=2',
    '--config.data.batch=2',
    '--config.data.length=64',
    '--config.eval_batches=1',
    '--config.optimizer.warmup_steps=1',
    '--config.mesh.fsdp=1',
  ],
  'gated_jax.decode': ['--max_tokens=4'],
  'gated_jax.decode.skip_report': ['--batches=1'],
  'gated_jax.data look': ['--tokens=20000'],
  'gated_jax.data tokenize': ['--workers=1'],
  'gated_jax.evals': [],
  'gated_jax.evals.compare': [],
  'gated_jax.hf import': [],
  'gated_jax.hf export': [],
  'gated_jax.hf add-gate': [],
  'gated_jax.hf list': [],
}
TRIED_ELSEWHERE = {
  'gated_jax.train': 'package_test.py',
  'gated_jax.aot': 'aot/pods_test.py',
  'gated_jax.aot.attention': 'cli_test.py',
  'gated_jax.aot.kernels': 'cli_test.py',
  'gated_jax.aot.layer': 'cli_test.py',
  'gated_jax.bench': 'bench_test.py',
  'gated_jax.decode.bench': 'cli_test.py',
  'gated_jax.evals.context': 'evals/context_test.py',
  'gated_jax.evals.report': 'evals/report_test.py',
  'gated_jax.evals.retrieval': 'evals/retrieval_test.py',
  'gated_jax.evals.sweep': 'evals/sweep_test.py',
  'docs/examples/backcopy.py': 'examples_test.py',
  'tests.storage.speed': 'storage/speed_test.py',
}
FIRST = ['--config=configs/smoke.py', '--workdir=runs/smoke']
RUN_PAGES = (
  'concepts.md',
  'data.md',
  'decoding.md',
  'hugging_face.md',
  'models.md',
  'train.md',
  'tune.md',
)


def key_of(program, words):
  """How the tables above call a command."""
  with_word = f'{program} {words[0]}' if words else program
  return with_word if with_word in SMALLER else program


def test_every_program_on_a_page_is_run_here_or_tried_elsewhere():
  programs = {
    key_of(program, words)
    for block in SHELL
    for program, words in calls_of(block)
    if program not in OF_OTHERS
  }
  assert programs <= {*SMALLER, *TRIED_ELSEWHERE}
  for program, test in TRIED_ELSEWHERE.items():
    text = (ROOT / 'tests' / test).read_text()
    assert program.split('.')[-1].removesuffix('.py') in text, (program, test)
  pages = {
    b.page for b in SHELL for p, w in calls_of(b) if key_of(p, w) in SMALLER
  }
  # What those run is a part of what these do.
  assert pages - {*RUN_PAGES} <= {
    'README.md',
    'benchmarks.md',
    'experiments.md',
    'install.md',
    'tpu_vm.md',
  }


def clear(program, words, folder):
  """Removes what a command will write: it must not be there."""
  targets = [w.partition('=')[2] for w in words if w.startswith('--workdir=')]
  if program == 'gated_jax.hf':
    places = [word for word in words[1:] if not word.startswith('--')]
    targets += places[1:]
  for target in targets:
    shutil.rmtree(folder / target, ignore_errors=True)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize('page', [
  # Their programs have tests of their own.
  pytest.param(page, marks=pytest.mark.nightly)
  if page in ('data.md', 'hugging_face.md', 'train.md', 'tune.md')
  else page
  for page in RUN_PAGES
])  # fmt: skip
def test_the_commands_of_a_page_run_in_turn(page, small, tmp_path, monkeypatch):
  """In the order in which they stand, each with what those before it made."""
  folder = tmp_path / 'work'
  shutil.copytree(small, folder, symlinks=True)
  monkeypatch.chdir(folder)
  (folder / 'web').mkdir()
  (folder / 'web/a.jsonl').write_text('{"text": "an ox eats grass"}\n' * 40)
  (folder / 'talks').mkdir()
  talk = {'prompt': 'What does an ox eat?', 'completion': 'Grass.'}
  lines = [json.dumps(talk | {'prompt': f'{i}?'}) + '\n' for i in range(200)]
  (folder / 'talks/a.jsonl').write_text(''.join(lines))
  write_bytes(folder, 64)
  write_bytes(folder / THEIRS, 64)
  ran = 0
  for block in SHELL:
    for program, words in calls_of(block) if block.page == page else ():
      key = key_of(program, words)
      if key not in SMALLER or '--help=data' in words:
        continue
      if words == FIRST and page != 'train.md':
        continue  # a run of this name is there
      clear(program, words, folder)
      ran += 1
      command = [*words, *SMALLER[key]]
      if '--config=configs/smoke.py' in words and program == 'train.py':
        command += ['--config.model.depth=1', '--config.model.width=32']
      assert call(program, command) == 0, (program, command)
  assert ran


def call(program, words):
  """The exit code of a program in a process of its own."""
  start = [program] if program.endswith('.py') else ['-m', program]
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  done = subprocess.run(
    [sys.executable, *start, *words],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  print(done.stdout, done.stderr)
  return done.returncode
