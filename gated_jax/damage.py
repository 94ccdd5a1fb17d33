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

LIST = 'files.json'
# Larger files are listed by size alone: a checksum would read them once more.
LARGEST = 1 << 20


def _entry(path: pathlib.Path) -> list[int]:
  """Size, and the checksum of a file that is small."""
  size = path.stat().st_size
  return [size, zlib.crc32(path.read_bytes())] if size <= LARGEST else [size]


def write_list(folder: pathlib.Path) -> None:
  """Notes size and checksum of every file of a folder that is complete."""
  paths = sorted(folder.rglob('*'))
  files = [p for p in paths if p.is_file() and p.name != LIST]
  entries = {str(p.relative_to(folder)): _entry(p) for p in files}
  (folder / LIST).write_text(json.dumps(entries), encoding='utf-8')


def _unlike_the_list(folder: pathlib.Path) -> list[str]:
  try:
    entries = dict(json.loads((folder / LIST).read_bytes()))
  except (OSError, ValueError, TypeError):
    return []
  differ = []
  for name, entry in entries.items():
    path = folder / name
    try:
      if _entry(path) != entry:
        differ.append(name)
    except OSError:
      differ.append(f'{name} (missing)')
  return differ


def _in_error(folder: pathlib.Path, error: BaseException | None) -> list[str]:
  """Files of the folder that an error, or a cause of it, names."""
  names: dict[str, None] = {}
  root = str(folder.absolute()) + '/'
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


def _of_arrays(folder: pathlib.Path, arrays: Iterable[str]) -> list[str]:
  """Files that hold arrays, given as 'item/path/of/array'."""
  names: dict[str, None] = {}
  for array in arrays:
    item, _, path = array.partition('/')
    try:
      store = ts.KvStore.open(
        {'driver': 'file', 'path': f'{(folder / item).absolute()}/'}
      ).result()
      manifest: Any = ts.ocdbt.dump(store).result()
      root = manifest['versions'][-1]['root']['location']
      for key, file in _values(store, root):
        if key.rpartition('/')[0] == path.replace('/', '.'):
          names[f'{item}/{file}'] = None
    except (ValueError, LookupError, OSError):  # no names, then
      continue
  return list(names)


def name_files(
  folder: pathlib.Path,
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
