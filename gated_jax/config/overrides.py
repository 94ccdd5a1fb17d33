"""Settings on a command line, on top of a config that is there already.

`train.py` builds its config from a file, and so leaves this to ml_collections.
A command that starts from a checkpoint has the checkpoint's config.
"""

import ast
import difflib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax.config.convert import from_dict
from gated_jax.config.convert import to_dict

PREFIX = '--config.'


def override(config: Any, words: Sequence[str]) -> Any:
  """A config with the settings of `--config.name=value` words.

  Raises:
    ValueError: a word is no such flag, names no setting, or has a value of
      another type.
  """
  values = to_dict(config)
  settings = dict(_settings(values, ''))
  for name, text in _pairs(words):
    if name not in settings:
      near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
      hint = f'; did you mean {PREFIX}{near[0]}?' if near else ''
      raise ValueError(f'there is no setting {PREFIX}{name}{hint}')
    *groups, last = name.split('.')
    group = values
    for part in groups:
      group = group[part]
    group[last] = _read(f'{PREFIX}{name}', text, settings[name])
  return from_dict(values, config)


def _settings(
  values: Mapping[str, Any], path: str
) -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _settings(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', value


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Names and values, with '=' or a space between them."""
  rest = iter(words)
  for word in rest:
    name, equals, value = word.partition('=')
    if not name.startswith(PREFIX):
      raise ValueError(f'{word!r} is not a flag: settings begin with {PREFIX}')
    if not equals:
      following = next(rest, None)
      if following is None:
        raise ValueError(f'{name} has no value')
      value = following
    yield name.removeprefix(PREFIX), value


def _read(name: str, text: str, old: Any) -> Any:
  """A value of the type that a setting has."""
  kind = type(old)
  try:
    if kind is str:
      return text
    if kind is bool:
      return {'true': True, 'false': False}[text.lower()]
    if kind in (tuple, list):
      value = ast.literal_eval(text)
      return tuple(value) if isinstance(value, tuple | list) else (value,)
    return kind(text)
  except (ValueError, KeyError, SyntaxError):
    raise ValueError(f'{name}={text} must be of type {kind.__name__}') from None
