"""Settings with their defaults and comments, as `--help=model` prints them.

What a setting is for stands once, beside it in gated_jax/config; this reads it
there.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from gated_jax.config import RunConfig

WIDTH = 80


def explain(group: str = '', default: Any = RunConfig()) -> str:
  """The settings of a group, one under the other.

  Args:
    group: as flags write it: 'model', 'model.gate'; '': those of no group.
    default: the settings that have the group.

  Raises:
    ValueError: there is no such group.
  """
  config = default
  for name in filter(None, group.split('.')):
    config = getattr(config, name, None)
  if not dataclasses.is_dataclass(config):
    known = list(groups(default, ''))
    near = difflib.get_close_matches(group, known, n=1) or known[:1]
    raise ValueError(
      f'--help={group}: there is no such group of settings; did you mean '
      f'{near[0]}? There are {", ".join(known)}'
    )
  prefix = f'--config.{group}.' if group else '--config.'
  comments = _comments(type(config))
  lines = [inspect.getdoc(type(config)) or '', '']
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      continue
    lines.append(f'{prefix}{field.name}={_written(value)}')
    comment = comments.get(field.name, '')
    lines += textwrap.wrap(
      comment, WIDTH, initial_indent='    ', subsequent_indent='    '
    )
  below = list(groups(config, group))
  if below:
    more = ', '.join(f'--help={name}' for name in below)
    lines += ['', *textwrap.wrap(f'More settings: {more}', WIDTH)]
  return '\n'.join(lines)


def groups(config: Any, path: str = '') -> Iterator[str]:
  """Names of the groups within settings, as flags write them."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      name = f'{path}.{field.name}' if path else field.name
      yield name
      yield from groups(value, name)


def _written(value: Any) -> str:
  """A value as a flag takes it."""
  return f"'{value}'" if value == '' or isinstance(value, tuple) else str(value)


def _comments(kind: type) -> dict[str, str]:
  """The comment of each field: the lines above it, and that beside it."""
  source = textwrap.dedent(inspect.getsource(kind))
  notes = {
    token.start[0]: token.string.lstrip('# ')
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  (tree,) = ast.parse(source).body
  assert isinstance(tree, ast.ClassDef)
  comments: dict[str, str] = {}
  last = 0  # line at which the statement before ends, with its comment
  for node in tree.body:
    end = node.end_lineno or node.lineno
    if isinstance(node, ast.AnnAssign):
      words = [notes[i] for i in range(last + 1, end + 1) if i in notes]
      comments[ast.unparse(node.target)] = ' '.join(words)
    last = end
  return comments
