"""Every code block of README, CONTRIBUTING and docs/: what the tests here try."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted((ROOT / 'docs').glob('*.md'))


@dataclasses.dataclass(frozen=True)
class Block:
  """A stretch of code on a page."""

  page: str
  line: int
  language: str  # the word behind ```, or 'indented'
  text: str

  @property
  def needed(self):
    """The packages of it that not everybody has."""
    return [
      name for name in ('equinox', 'lm_eval') if f'import {name}' in self.text
    ]

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
      language = line.strip('` ')
      text = '\n'.join(lines[begin + 1 : place])
      place += 1
    elif line.startswith('    ') and not (lines[begin - 1] if begin else ''):
      while place < len(lines) and lines[place].startswith(('    ', '\n')):
        place += 1
      language = 'indented'
      text = '\n'.join(one[4:] for one in lines[begin:place])
    else:
      continue
    yield Block(page.name, begin + 1, language, text)


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


# Programs of others.
OF_OTHERS = ('venv', 'pip', 'uv', 'pytest')
