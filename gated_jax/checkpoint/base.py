"""The base of a checkpoint: where the arrays lie that it does not hold itself.

A run that trains a part of what it started from writes that part alone. Its
`run` file names the rest and says where it lies, with the sums of all arrays
beside it: so a base that is gone, or is another one now, is found before
anything is computed from it. `parameters.py` reads both together.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from gated_jax import paths
from gated_jax.checkpoint.folder import find
from gated_jax.checkpoint.folder import read_run
from gated_jax.checkpoint.folder import stored_arrays
from gated_jax.checkpoint.sums import Records
from gated_jax.paths import Path

# A file beside the steps of a run, or in one of them, that says where the base
# is now.
MOVED = 'base.txt'


class NoBase(ValueError):
  """The base of a checkpoint is gone, or another one lies in its place."""


Tree = Any


@dataclasses.dataclass(frozen=True)
class Base:
  """The arrays that a checkpoint leaves with another one.

  Attributes:
    path: the folder of that one.
    relative: the same from the folder of the checkpoint; '': there is no way.
    digest: of the records of its parameters; '': it has none.
    arrays: names of the arrays that are left there.
  """

  path: str
  relative: str
  digest: str
  arrays: tuple[str, ...]

  def seen_from(self, folder: Path) -> dict[str, Any]:
    """The values that a checkpoint in this folder records."""
    there = relative(pathlib.Path(self.path), folder)
    return {
      'path': self.path,
      'relative': '' if paths.in_bucket(self.path) else there,
      'digest': self.digest,
      'arrays': list(self.arrays),
    }


def base_in(run: Mapping[str, Any]) -> Base | None:
  """The base that a `run` file names; None: the checkpoint is whole."""
  values = run.get('base')
  if not values:
    return None
  return Base(**{**values, 'arrays': tuple(values['arrays'])})


def relative(path: pathlib.Path, folder: Path) -> str:
  """The way to a path from a folder; '': one of them is in a bucket."""
  if not isinstance(folder, pathlib.Path):
    return ''
  return os.path.relpath(path, paths.absolute(folder))


def digest_of(arrays: Mapping[str, Any] | None) -> str:
  """A digest of the records of parameters; '' where there are none."""
  own = {k: v for k, v in (arrays or {}).items() if k.startswith('params/')}
  if not own:
    return ''
  return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def divide(params: Tree, base: Base | None) -> tuple[Tree, Tree]:
  """Parameters that a checkpoint holds, and those it leaves with its base."""
  if base is None:
    return params, {}
  left = set(base.arrays)
  own: dict[tuple[str, ...], Any] = {}
  rest: dict[tuple[str, ...], Any] = {}
  flat = traverse_util.flatten_dict(params)
  for path, x in flat.items():
    there = '/'.join(('params', *path)) in left
    (rest if there else own)[path] = x
  return traverse_util.unflatten_dict(own), traverse_util.unflatten_dict(rest)


def join(own: Tree, rest: Tree) -> Tree:
  """The parameters of both trees in one."""
  both = traverse_util.flatten_dict(own) | traverse_util.flatten_dict(rest)
  return traverse_util.unflatten_dict(both)


def _candidates(
  base: Base, folder: Path, also: Iterable[str]
) -> Iterator[tuple[str, str]]:
  """Places where a base may lie, and who says so."""
  for path in also:
    yield path, 'init_from'
  for place in (folder, folder.parent, folder.parent.parent):
    if paths.is_file(place / MOVED):
      text = paths.read_bytes(place / MOVED).decode(errors='replace').strip()
      yield text, f'{place / MOVED}'
  yield base.path, ''
  if base.relative and isinstance(folder, pathlib.Path):
    yield os.path.normpath(paths.absolute(folder) / base.relative), ''


def find_base(
  folder: Path, run: Mapping[str, Any], also: Iterable[str] = ()
) -> Path:
  """The folder of a checkpoint's base.

  Args:
    folder: of the checkpoint.
    run: its `run` file, which names a base.
    also: where to look first.

  Raises:
    NoBase: it is nowhere, or another one is there.
  """
  base = base_in(run)
  assert base is not None, f'{folder} is whole'
  problem = f'is not at {base.path}'
  for path, who in _candidates(base, folder, also):
    try:
      place = find(path)
      digest = digest_of(read_run(place).get('arrays'))
    except (ValueError, RuntimeError) as error:
      if who and who != 'init_from':
        problem = f'is not at {path}, which {who} names'
      elif isinstance(error, RuntimeError):
        problem = f'cannot be read: {error}'
      continue
    if not base.digest or digest == base.digest:
      return place
    problem = f'is not at {place}: other parameters lie there now'
  raise NoBase(
    f'{folder} holds what was trained alone, and its base {problem}; write '
    f'where it is into {folder.parent / MOVED}'
  )


def base_for(
  path: str | os.PathLike[str], arrays: Records, still: Iterable[str]
) -> Base | None:
  """The base of a run that started from a checkpoint; None: it has none.

  It is left what the run holds as it lies there, name by name. A base that
  leaves all of that with its own is passed over.

  Args:
    path: where the run started from.
    arrays: records of the run's parameters.
    still: names of those that do not train.
  """
  folder = find(path)
  run = read_run(folder)
  recorded = run.get('arrays')
  stored = stored_arrays(folder, run)

  def lies_there(name: str) -> bool:
    """True for an array of the same shape, and the same sum if it can be."""
    there, here = stored.get(name), list(arrays[name])
    if there is None or list(there[1]) != here[1]:
      return False
    return there[0] != here[0] or not recorded or there[2] == here[2]

  names = tuple(sorted(name for name in still if lies_there(name)))
  if not names:
    return None
  under = base_in(run)
  same = all(stored[name][0] == arrays[name][0] for name in names)
  if under and same and set(names) <= set(under.arrays):
    folder = find_base(folder, run)
    recorded = read_run(folder).get('arrays')
  place = os.fspath(paths.absolute(folder))
  return Base(place, '', digest_of(recorded), names)
