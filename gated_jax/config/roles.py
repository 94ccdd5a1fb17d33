"""The role of a setting, said where the setting is defined.

    model      decides which function the model computes
    execution  decides how a run trains or computes; fixed while it lasts
    free       changes a later loss by rounding at most: a resumed run may
               have another value

Whoever needs one kind of setting asks `names_with`: a resumed run compares all
that are not free, Hugging Face files describe those of the model alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

ROLES = ('model', 'execution', 'free')


def setting(default: Any, role: str) -> Any:
  """A dataclass field whose role differs from that of its class."""
  assert role in ROLES, role
  return dataclasses.field(default=default, metadata={'role': role})


def _roles(config: Any, path: str) -> Iterator[tuple[str, str]]:
  """Yields (dotted name, role); a mark on a group covers all that is in it."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    marked = field.metadata.get('role')
    if dataclasses.is_dataclass(value):
      for name, role in _roles(value, f'{path}{field.name}.'):
        yield name, marked or role
    else:
      yield f'{path}{field.name}', marked or type(config).ROLE


def names_with(config: Any, *roles: str) -> frozenset[str]:
  """Dotted names, as flags write them, of the settings that have a role.

  Args:
    config: any group of settings; its class says in ROLE what holds where a
      field says nothing.
    *roles: of `ROLES`.
  """
  return frozenset(name for name, role in _roles(config, '') if role in roles)
