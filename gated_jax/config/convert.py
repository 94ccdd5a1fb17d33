"""Settings to plain values and back; where two sets of them differ."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gated_jax.config.run import RunConfig


def to_dict(config: Any) -> dict[str, Any]:
  """Nested plain values: what JSON and ConfigDict can hold."""
  return dataclasses.asdict(config)


def from_dict(
  values: Mapping[str, Any], default: Any = RunConfig(), path: str = ''
) -> Any:
  """The dataclass of `default` with `values` put in.

  Lists become tuples and whole numbers become floats where the default is
  one; nothing else is converted. Unknown names and wrong types are refused.
  """
  fields = {f.name for f in dataclasses.fields(default)}
  found: dict[str, Any] = {}
  for name, value in values.items():
    if name not in fields:
      near = difflib.get_close_matches(str(name), sorted(fields), n=1)
      hint = f'; did you mean {path}{near[0]}?' if near else ''
      raise ValueError(f'there is no setting {path}{name}{hint}')
    old = getattr(default, name)
    if dataclasses.is_dataclass(old):
      if not isinstance(value, Mapping):
        raise ValueError(f'{path}{name}={value!r} must be a group of settings')
      found[name] = from_dict(value, old, f'{path}{name}.')
    else:
      found[name] = _as_type_of(old, value, f'{path}{name}')
  return dataclasses.replace(default, **found)


def _as_type_of(old: Any, value: Any, name: str) -> Any:
  kind = type(old)
  if kind is tuple and isinstance(value, list | tuple):
    # The only empty default is a tuple of strings; the others show their type.
    like = old[0] if old else ''
    return tuple(_as_type_of(like, item, name) for item in value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise ValueError(
      f'{name}={value!r} must be of type {kind.__name__}, '
      f'not {type(value).__name__}'
    )
  return value


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], path: str = ''
) -> dict[str, tuple[Any, Any]]:
  """Settings that differ: full name to (old value, new value)."""
  found: dict[str, tuple[Any, Any]] = {}
  absent = object()
  for name in {**old, **new}:
    a, b = old.get(name, absent), new.get(name, absent)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found |= differences(a, b, f'{path}{name}.')
      continue
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    if a != b:
      a, b = ('(none)' if x is absent else x for x in (a, b))
      found[f'{path}{name}'] = (a, b)
  return found
