"""Pages of the site that stand elsewhere: MkDocs calls these functions.

The README is the first page, CONTRIBUTING.md the last, and the settings are
what `train.py --help=GROUP` prints. So none of them is written twice.
"""

import os
import pathlib
import re
from typing import Any

from address import in_colab  # MkDocs lets a hook import what lies beside it
from address import repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from gated_jax.config import RunConfig
from gated_jax.explain import explain
from gated_jax.explain import groups

DOCS = pathlib.Path(__file__).parents[1]
ROOT = DOCS.parent
# Pages of the site that are files of the repository's top.
COPIES = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md'}
LINK = re.compile(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Puts pages that the navigation does not name behind the guides.

  Where the project has an address, every page leads to it.
  """
  config.repo_url = repository() or None
  nav = config.nav or []
  guides = next(part['Guides'] for part in nav if 'Guides' in part)
  named = str(nav)
  guides += sorted(
    path.name for path in DOCS.glob('*.md') if f"'{path.name}'" not in named
  )
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that no file of docs/ holds."""
  for page, source in COPIES.items():
    text = (ROOT / source).read_text(encoding='utf-8')
    files.append(File.generated(config, page, content=with_links(text, ROOT)))
  return files


def on_page_markdown(markdown: str, page: Page, **others: Any) -> str:
  """Turns links that lead out of docs/, and adds the settings."""
  del others
  name = page.file.src_uri
  if name in COPIES:
    return markdown
  if name == 'api/settings.md':
    markdown += settings()
  return with_links(markdown, (DOCS / name).parent)


def with_links(text: str, folder: pathlib.Path) -> str:
  """The text of a file, with links that hold in the site.

  What is no page and no file of docs/ leads into the repository, a notebook
  into Colab. Without an address of the project its words stay, without a link.

  Args:
    text: Markdown.
    folder: of the repository, from which its links lead.
  """
  address = repository()
  up = '../' * len(folder.relative_to(DOCS).parts) if folder != ROOT else ''
  pages = {(ROOT / source): page for page, source in COPIES.items()}

  def link(match: re.Match[str]) -> str:
    """The link as it is in the site."""
    mark, words, target = match.groups()
    target, sharp, anchor = target.partition('#')
    path = pathlib.Path(os.path.normpath(folder / target))
    if path in pages:
      return f'[{words}]({up}{pages[path]}{sharp}{anchor})'
    if not path.is_relative_to(DOCS):
      if not address:
        return words
      there = path.relative_to(ROOT).as_posix()
      place = f'{address}/blob/main/{there}{sharp}{anchor}'
      if path.suffix == '.ipynb':
        place = in_colab(address, path.name) or place
      return f'[{words}]({place})'
    place = path.relative_to(DOCS).as_posix()
    return f'{mark}[{words}]({up}{place}{sharp}{anchor})'

  return LINK.sub(link, text)


def settings() -> str:
  """Every setting with its default and what it is for, by group."""
  parts = ['']
  for group in ('', *groups(RunConfig())):
    text = explain(group).partition('\nMore settings:')[0].strip()
    parts.append(f'## {group or "The run"}\n\n```text\n{text}\n```')
  return '\n\n'.join(parts) + '\n'
