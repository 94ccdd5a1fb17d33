"""What the README names exists; tests/pages runs what it shows."""

import pathlib
import re

import gated_jax

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)


def test_there_are_three_ways_in():
  assert len(EXAMPLES) == 3


def test_files_it_links_to_exist():
  links = re.findall(r'\]\(([^)#:]+)\)', TEXT)
  assert links
  assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_citation_is_of_this_version():
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {gated_jax.__version__}\n' in citation
  assert 'arXiv:2505.06708' in citation


def test_the_map_names_what_is_there():
  names = re.findall(r'^ {4,8}(\S+/|\S+\.py) ', TEXT, flags=re.MULTILINE)
  rooms = ('gated_jax', 'gated_jax/ops', 'gated_jax/model')
  homes = (ROOT, *(ROOT / room for room in rooms))
  missing = [n for n in names if not any((h / n).exists() for h in homes)]
  assert len(names) > 12
  assert missing == []
