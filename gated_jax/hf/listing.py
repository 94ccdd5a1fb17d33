"""The table of families in words, for a terminal and for docs/models.md."""

import textwrap
from collections.abc import Iterator

from gated_jax.hf.families import FAMILIES
from gated_jax.hf.families import NOT_YET
from gated_jax.hf.families import Family

WIDTH = 80


def _lines(family: Family) -> Iterator[str]:
  """A family in words: what it is, and what of it is passed over."""
  marks = ', '.join(sorted(family.marks))
  yield f'config.json says {family.model_type}' + (
    f' and one of {marks}' if marks else ''
  )
  yield f'loads: {family.about}'
  if family.limits:
    yield f'but: {family.limits}'.replace('`', '')


def text() -> str:
  """The page that `python -m gated_jax.hf list` prints."""
  paragraphs = []
  for family in FAMILIES:
    paragraphs.append(family.name)
    paragraphs += [
      textwrap.fill(line, WIDTH, initial_indent='  ', subsequent_indent='    ')
      for line in _lines(family)
    ]
  paragraphs.append('\nGated as well, and refused:')
  paragraphs += [f'  {kind}: {reason}' for kind, reason in NOT_YET.items()]
  return '\n'.join(paragraphs)


def markdown() -> str:
  """The same as two tables."""
  rows = [
    '| name | config.json says | what loads | what does not, and why |',
    '|---|---|---|---|',
  ]
  for family in FAMILIES:
    says = f'`{family.model_type}`' + (
      f' and one of {", ".join(f"`{m}`" for m in sorted(family.marks))}'
      if family.marks
      else ''
    )
    rows.append(
      f'| `{family.name}` | {says} | {family.about} | {family.limits} |'
    )
  rows += ['', '| config.json says | why it is refused |', '|---|---|']
  rows += [f'| `{kind}` | {reason} |' for kind, reason in NOT_YET.items()]
  return '\n'.join(rows)
