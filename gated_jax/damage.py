"""Names the damaged file of a folder that did not read as it was written.

Reading never depends on this: a folder whose list of files is missing or
damaged itself reads like any other. Only once something failed are names
looked for, in this order: files that the list knows with another size or
checksum, files that the error names, files that hold the arrays which differ.
"""

import json
import pathlib
import re
import zlib
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from gated_jax import paths
from gated_jax.paths import Path

LIST = 'files.json'
# Larger files are listed by size alone: a checksum would read them once more.
LARGEST = 1 << 20


def _entry(path: pathlib.Path) -> list[int]:
  """Size, and the checksum of a file that is small."""
  size = path.stat().st_size
  return [size, zlib.crc32(path.read_bytes())] if size <= LARGEST else [size]


def _entries(folder: Path) -> dict[str, list[Any]]:
  """Size and checksum of each file of a folder, but for the list itself.

  A bucket says size and checksum of all objects in one answer.
  """
  if isinstance(folder, pathlib.Path):
    files = paths.files_below(folder)
    found = {str(p.relative_to(folder)): _entry(p) for p in files}
  else:
    found = paths.checksums_below(folder)
  return {name: entry for name, entry in found.items() if name != LIST}


def write_list(folder: Path) -> None:
  """Notes size and checksum of every file of a folder that is complete."""
  paths.write_bytes(folder / LIST, json.dumps(_entries(folder)).encode())


def has_list(folder: Path) -> bool:
  """Tells whether a folder was once found complete."""
  return paths.exists(folder / LIST)


def has_all_files(folder: Path) -> bool:
  """Tells whether there is a list of files, and no file of it is missing."""
  try:
    listed = set(json.loads(paths.read_bytes(folder / LIST)))
  except (FileNotFoundError, ValueError, TypeError):
    return False
  return listed <= set(_entries(folder))


def _unlike_the_list(folder: Path) -> list[str]:
  try:
    listed = dict(json.loads(paths.read_bytes(folder / LIST)))
  except (OSError, ValueError, TypeError):
    return []
  if not isinstance(folder, pathlib.Path):
    there = _entries(folder)
    return [
      name if name in there else f'{name} (missing)'
      for name, entry in listed.items()
      if there.get(name) != entry
    ]
  differ = []
  for name, entry in listed.items():
    try:
      if _entry(folder / name) != entry:
        differ.append(name)
    except OSError:
      differ.append(f'{name} (missing)')
  return differ


def _in_error(folder: Path, error: BaseException | None) -> list[str]:
  """Files of the folder that an error, or a cause of it, names."""
  names: dict[str, None] = {}
  root = f'{paths.absolute(folder)}/'
  while error is not None:
    quoted = re.findall(r'"([^"\\]+)"', str(error))
    for text in [*quoted, str(getattr(error, 'filename', ''))]:
      if text.startswith(root) and not text.endswith('/'):
        names[text.removeprefix(root)] = None
    error = error.__cause__ or error.__context__
  return list(names)


def _values(store: ts.KvStore, location: str) -> Iterator[tuple[str, str]]:
  """Yields (key, file) of all values below a node of an OCDBT tree.

  Small ones stand in the nodes, which have checksums of their own.
  """
  node: Any = ts.ocdbt.dump(store, location).result()
  for entry in node['entries']:
    if 'location' in entry:
      yield from _values(store, entry['location'])
    elif 'indirect_value' in entry:
      yield entry['key'].decode(), _file(entry['indirect_value'])


def _file(location: str) -> str:
  """The file in a location 'kind:folder:file:offset:length'."""
  _, folder, name, _, _ = location.split(':')
  return folder + name


def _of_arrays(folder: Path, arrays: Iterable[str]) -> list[str]:
  """Files that hold arrays, given as 'item/path/of/array'."""
  names: dict[str, None] = {}
  for array in arrays:
    item, _, path = array.partition('/')
    try:
      spec = paths.key_value_store(folder / item)
      store = ts.KvStore.open(spec).result()
      manifest: Any = ts.ocdbt.dump(store).result()
      root = manifest['versions'][-1]['root']['location']
      for key, file in _values(store, root):
        if key.rpartition('/')[0] == path.replace('/', '.'):
          names[f'{item}/{file}'] = None
    except (ValueError, LookupError, OSError):  # no names, then
      continue
  return list(names)


def name_files(
  folder: Path,
  error: BaseException | None = None,
  arrays: Iterable[str] = (),
) -> str:
  """The damaged files of a folder, as words; '' where none can be named.

  Args:
    folder: complete when it was written.
    error: raised by reading it.
    arrays: names of those that differ from what was saved.
  """
  names = (
    _unlike_the_list(folder)
    or _in_error(folder, error)
    or _of_arrays(folder, arrays)
  )
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
