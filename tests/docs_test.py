"""What the guides show runs, but for what needs a trained run; links lead on."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import gated_jax

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
BLOCKS = [
  (path.name, number, needed, code)
  for path in (DOCS / 'concepts.md', DOCS / 'modules.md')
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
  for page in DOCS.glob('**/*.md'):
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text())
    assert [x for x in links if not (page.parent / x).exists()] == [], page.name


def test_the_reference_has_every_public_name():
  pages = ''.join(page.read_text() for page in DOCS.glob('api/*.md'))
  named = re.findall(r'^::: gated_jax\.(\w+)$', pages, re.MULTILINE)
  assert set(gated_jax.__all__) <= set(named)


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
      assert 'class="mermaid"' not in text, 'its program comes from elsewhere'


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
