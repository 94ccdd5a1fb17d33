"""Links lead on, the reference is whole, and the site fetches nothing."""

import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import gated_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'


def test_links_lead_somewhere():
  for page in DOCS.glob('**/*.md'):
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text())
    assert [x for x in links if not (page.parent / x).exists()] == [], page.name


NAMED = re.findall(
  r'^::: (\S+)$',
  ''.join(page.read_text() for page in DOCS.glob('api/*.md')),
  re.MULTILINE,
)


def thing(name):
  """What a dotted name stands for; None where it needs an extra package."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if not str(error.name).startswith('gated_jax'):
      return None
  module, _, last = name.rpartition('.')
  home = thing(module)
  return None if home is None else getattr(home, last)


def in_the_reference(name):
  """Says whether a page names it, or the module that it is written in."""
  what = thing(name)
  if name in NAMED or not callable(what):
    return True  # what has no docstring: a module, a constant
  # A name that two packages export is shown once.
  home = f'{what.__module__}.{what.__name__}'
  if home in NAMED or what.__module__ in NAMED:
    return True
  return any(thing(entry) is what for entry in NAMED)


def exported():
  """What each package lists in __all__."""
  packages = [gated_jax.__name__]
  for found in pkgutil.walk_packages(gated_jax.__path__, 'gated_jax.'):
    if found.ispkg:
      packages.append(found.name)
  for package in packages:
    text = (ROOT / package.replace('.', '/') / '__init__.py').read_text()
    if '__all__' in text:
      for name in importlib.import_module(package).__all__:
        yield f'{package}.{name}'


def imported_by_readers():
  """What the pages, the examples and the notebooks import."""
  files = [ROOT / 'README.md', *DOCS.glob('*.md'), *DOCS.glob('examples/*.py')]
  texts = [path.read_text() for path in files]
  for path in (ROOT / 'colab').glob('*.ipynb'):
    cells = json.loads(path.read_text())['cells']
    texts += [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
  line = re.compile(r'^from (gated_jax\S*) import (.*)$', re.MULTILINE)
  for module, names in line.findall('\n'.join(texts)):
    for name in names.split(', '):
      yield f'{module}.{name.split(" as ")[0]}'


@pytest.mark.parametrize('names', [exported, imported_by_readers])
def test_the_reference_has_every_public_name(names):
  public = sorted(set(names()))
  assert len(public) > 20
  assert [name for name in public if not in_the_reference(name)] == []


def test_what_the_reference_names_has_a_docstring():
  bare = [n for n in NAMED if thing(n) and not inspect.getdoc(thing(n))]
  assert bare == []


# What a browser would fetch from elsewhere as soon as it shows a page.
FETCHED = re.compile(
  r'<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["\']?'
  r'((?:https?:)?//[^"\'\s>]+)'
  r'|(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')]+)'
)


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
  pytest.importorskip('mkdocs')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'mkdocs', 'build', '--strict'),
      *('-f', DOCS / 'site/mkdocs.yml', '-d', tmp_path),
    ],
    check=False,
    capture_output=True,
    text=True,
    env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'index.html').exists()
  for path in tmp_path.rglob('*'):
    if path.suffix in ('.html', '.css'):
      text = path.read_text()
      assert not FETCHED.search(text), path
      assert '```' not in text, f'a block that is none in {path}'
      assert 'class="mermaid"' not in text, 'its program comes from elsewhere'


@pytest.mark.parametrize(
  ('address', 'readme'),
  [
    ('', 'see it, the licence'),
    (
      'https://github.com/owner/gated',
      'see [it](https://colab.research.google.com/github/owner/gated/blob/main/'
      'colab/a.ipynb), '
      '[the licence](https://github.com/owner/gated/blob/main/LICENSE)',
    ),
  ],
)
def test_links_out_of_the_site_lead_to_the_repository_if_it_has_an_address(
  address, readme, monkeypatch
):
  pytest.importorskip('mkdocs')
  monkeypatch.syspath_prepend(DOCS / 'site')
  pages = importlib.import_module('pages')
  monkeypatch.setattr(pages, 'repository', lambda: address)
  text = 'see [it](colab/a.ipynb), [the licence](LICENSE)'
  assert pages.with_links(text, ROOT) == readme
  # Pages of the site are linked as ever.
  inside = pages.with_links('[gate](docs/concepts.md#scores)', ROOT)
  assert inside == '[gate](concepts.md#scores)'


@pytest.mark.parametrize(
  ('html', 'fetched'),
  [
    ('<script src="https://host/a.js">', True),
    ('<link rel="stylesheet" href=//host/a.css>', True),
    ('@font-face{src:url(https://host/a.woff2)}', True),
    ('<a href="https://host/page">', False),
    ('<img src="figures/a.png">', False),
  ],
)
def test_what_the_site_would_fetch_is_seen(html, fetched):
  assert bool(FETCHED.search(html)) == fetched
