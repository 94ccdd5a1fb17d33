"""What the guides show runs, but for what needs a trained run; links lead on."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
BLOCKS = [
  (path.name, number, needed, code)
  for path in (DOCS / 'modules.md',)
  for number, (needed, code) in enumerate(
    re.findall(r'```python *(\w*)\n(.*?)```', path.read_text(), re.DOTALL)
  )
]


@pytest.mark.parametrize(
  ('page', 'number', 'needed', 'code'),
  BLOCKS,
  ids=[f'{page}-{number}' for page, number, *_ in BLOCKS],
)
def test_a_block_runs(page, number, needed, code):
  if needed:
    pytest.importorskip(needed)
  exec(compile(code, f'{page}, block {number}', 'exec'), {'__name__': 'docs'})


def test_links_lead_somewhere():
  for page in DOCS.glob('*.md'):
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text())
    assert [x for x in links if not (DOCS / x).exists()] == [], page.name
