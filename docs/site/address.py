"""Writes the project's address, which stands in setup.py, wherever it is told.

    python docs/site/address.py

Notebooks travel alone and a README is read before anything is installed, so
both hold the address themselves. Whoever changes it, or
`colab/install_cell.py`, runs this once; a test fails until it was run. Without
an address the pages say ADDRESS, and there are no badges, which would lead
nowhere.
"""

import json
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ('README.md', 'docs/install.md')  # those that say how to get it
UNKNOWN = 'ADDRESS'
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'
BADGES = re.compile(r'\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n*')


def repository(root: pathlib.Path = ROOT) -> str:
  """The repository's address, or '' where setup.py has none yet."""
  text = (root / 'setup.py').read_text(encoding='utf-8')
  return re.findall(r"^REPOSITORY = '(.*)'", text, re.MULTILINE)[0]


def in_colab(address: str, notebook: str) -> str:
  """Where Colab opens a notebook of `colab/`; '' for what it cannot reach."""
  on_github = re.fullmatch(
    r'https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?', address
  )
  if not on_github:
    return ''
  site = 'https://colab.research.google.com/github'
  return f'{site}/{on_github[1]}/blob/main/colab/{notebook}'


def badge(address: str, notebook: str) -> str:
  """A picture that opens the notebook in Colab, or ''."""
  there = in_colab(address, notebook)
  return f'[![Open in Colab]({BADGE})]({there})' if there else ''


def page(text: str, address: str) -> str:
  """A page that tells how to clone and to install from the address."""
  known = address or UNKNOWN
  return re.sub(r"(git clone |git\+)[^\s'`]+", rf'\g<1>{known}', text)


def citation(text: str, address: str) -> str:
  """CITATION.cff, which names the repository if it has an address."""
  text = re.sub(r'^repository-code:.*\n', '', text, flags=re.MULTILINE)
  line = f'repository-code: {address}\n' if address else ''
  return text.replace('license:', f'{line}license:', 1)


def notebook(
  book: dict[str, Any], name: str, install: str, address: str
) -> dict[str, Any]:
  """The notebook with its badge and its first code cell.

  Args:
    book: as it is in the file.
    name: the file's.
    install: the text of `colab/install_cell.py`.
    address: of the repository, or ''.
  """
  title = book['cells'][0]
  text = BADGES.sub('', ''.join(title['source']))
  if mark := badge(address, name):
    text = f'{mark}\n\n{text}'
  title['source'] = text.splitlines(keepends=True)
  cell = next(c for c in book['cells'] if c['cell_type'] == 'code')
  install = install.replace(
    "REPOSITORY = ''", f'REPOSITORY = {address!r}'
  ).rstrip('\n')
  cell['source'] = install.splitlines(keepends=True)
  cell['metadata'] = {'cellView': 'form'}  # Colab shows its first line alone
  return book


def expected(root: pathlib.Path = ROOT) -> dict[pathlib.Path, str]:
  """What every file that tells the address should be."""
  address = repository(root)
  install = (root / 'colab/install_cell.py').read_text(encoding='utf-8')
  files = {}
  for name in PAGES:
    path = root / name
    files[path] = page(path.read_text(encoding='utf-8'), address)
  path = root / 'CITATION.cff'
  files[path] = citation(path.read_text(encoding='utf-8'), address)
  for path in sorted((root / 'colab').glob('*.ipynb')):
    book = json.loads(path.read_text(encoding='utf-8'))
    book = notebook(book, path.name, install, address)
    files[path] = json.dumps(book, indent=1, ensure_ascii=False) + '\n'
  return files


def main() -> None:
  """Writes the files that differ, and says which."""
  for path, text in expected().items():
    if path.read_text(encoding='utf-8') != text:
      path.write_text(text, encoding='utf-8')
      print(f'wrote {path.relative_to(ROOT)}')


if __name__ == '__main__':
  main()
