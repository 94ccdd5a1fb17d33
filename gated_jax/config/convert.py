"""Settings to plain values and back; where two sets of them differ.

`upgrade` reads what runs saved before layers were written as words.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from gated_jax.config.layers import MoEConfig
from gated_jax.config.run import RunConfig

# Above it a float cannot hold every whole number.
_WHOLE = 2**53

# Settings that existed once, and what says the same now.
_GONE = {
  'model.windows': "model.pattern=('attention:window=128', 'attention')",
  'model.global_rope': "model.pattern=('attention:window=128', "
  "'attention:nope')",
}


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
  changes: dict[str, Any] = {}
  for name, value in values.items():
    if name not in fields:
      if f'{path}{name}' in _GONE:
        raise ValueError(
          f'there is no setting {path}{name} any more: layers are words now, '
          f'such as {_GONE[f"{path}{name}"]}'
        )
      near = difflib.get_close_matches(str(name), sorted(fields), n=1)
      hint = f'; did you mean {path}{near[0]}?' if near else ''
      raise ValueError(f'there is no setting {path}{name}{hint}')
    old = getattr(default, name)
    if dataclasses.is_dataclass(old):
      if not isinstance(value, Mapping):
        raise ValueError(f'{path}{name}={value!r} must be a group of settings')
      changes[name] = from_dict(value, old, f'{path}{name}.')
    else:
      changes[name] = _as_type_of(old, value, f'{path}{name}')
  return dataclasses.replace(default, **changes)


def _as_type_of(old: Any, value: Any, name: str) -> Any:
  kind = type(old)
  if kind is tuple and isinstance(value, list | tuple):
    # The only empty default is a tuple of strings; the others show their type.
    like = old[0] if old else ''
    return tuple(_as_type_of(like, item, name) for item in value)
  if kind is float and type(value) is int:
    if abs(value) > _WHOLE:
      raise ValueError(f'{name}={value} must be at most {_WHOLE}, or a float')
    return float(value)
  if type(value) is not kind:
    raise ValueError(
      f'{name}={value!r} must be of type {kind.__name__}, '
      f'not {type(value).__name__}'
    )
  return value


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of a saved run in the words of this version.

  Until layers were words, `model.windows` repeated over the depth,
  `model.global_rope` took positions from the layers that see all keys, and
  `model.moe.experts=0` meant an MLP everywhere. The parameters of such a run
  lie where its converted config says.

  Args:
    values: of a RunConfig, as JSON holds them; those of today come back
      unchanged.
  """
  model = dict(values.get('model', {}))
  if 'windows' not in model:
    return dict(values)
  experts = model.get('moe', {}).get('experts', 0)
  global_rope = model.pop('global_rope', True)

  def word(window: int) -> str:
    """The word for a layer of the old settings."""
    fields = f':window={window}' if window else ''
    if not (window or global_rope):
      fields = ':nope'
    return f'attention{fields}' + '+moe' * bool(experts)

  model['lead'] = []
  model['pattern'] = [word(window) for window in model.pop('windows')]
  if not experts:
    model['moe'] = to_dict(MoEConfig())
  return {**values, 'model': model}


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], path: str = ''
) -> dict[str, tuple[Any, Any]]:
  """Settings that differ: full name to (old value, new value)."""
  changed: dict[str, tuple[Any, Any]] = {}
  absent = object()
  for name in {**old, **new}:
    a, b = old.get(name, absent), new.get(name, absent)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      changed |= differences(a, b, f'{path}{name}.')
      continue
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    if a != b:
      a, b = ('(none)' if x is absent else x for x in (a, b))
      changed[f'{path}{name}'] = (a, b)
  return changed
