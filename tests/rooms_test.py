"""Imports go one way: the rooms of the house, and who may know what.

CONTRIBUTING.md's table of rooms is the whole rule. Imports inside functions
count like the others.
"""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Room: the rooms that it may import, and the libraries beside the standard one.
ROW = re.compile(r'^\| `([\w.]+)/?` \|[^|]*\|([^|]*)\|([^|]*)\|$', re.MULTILINE)
ROOMS = {
  room.removesuffix('.py') if room != 'train.py' else room: (rooms, libraries)
  for room, rooms, libraries in ROW.findall(
    (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
  )
}
BACKENDS = ('xla', 'cudnn', 'splash', 'pallas_tpu')


def module_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_of(p): p for p in sorted(ROOT.glob('gated_jax/**/*.py'))}


def imports(path):
  """Full names: modules of ours as such, other things as they are written."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        found.add(name if name in FILES else node.module)
  return found


def files_of(room):
  whole = room if room.endswith('.py') else f'gated_jax/{room}.py'
  folder = room if room == 'configs' else f'gated_jax/{room}'
  return [*ROOT.glob(whole), *sorted(ROOT.glob(f'{folder}/**/*.py'))]


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_imports_what_its_row_says(room):
  rooms, libraries = (set(names.split()) for names in ROOMS[room])
  own = {'configs'} if room == 'configs' else {room}
  for path in files_of(room):
    for name in imports(path):
      top, _, rest = name.partition('.')
      known = rooms if top == 'gated_jax' and rest else libraries
      what = rest.partition('.')[0] if top == 'gated_jax' and rest else top
      allowed = known | own | set(sys.stdlib_module_names)
      assert what in allowed, f'{path.relative_to(ROOT)} imports {name}'


def test_every_file_is_in_a_room_and_every_folder_is_a_package():
  found = {p.relative_to(ROOT / 'gated_jax').parts[0] for p in FILES.values()}
  rooms = {name.removesuffix('.py') for name in found} - {'__init__'}
  assert rooms <= set(ROOMS)
  for path in FILES.values():
    assert (path.parent / '__init__.py').exists(), (
      f'{path.parent} is no package'
    )
    assert path.stem not in ('utils', 'helpers', 'common')


def test_nothing_imports_in_a_circle():
  graph = {
    # A package that names its own modules for its readers is no circle.
    name: {
      other
      for other in imports(path) & set(FILES)
      if not (path.stem == '__init__' and other.startswith(f'{name}.'))
    }
    for name, path in FILES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle


def test_only_the_door_to_attention_imports_backends():
  for path in (ROOT / 'gated_jax/ops/attention').glob('*.py'):
    if path.stem != 'api':
      names = tuple(f'gated_jax.ops.attention.{name}' for name in BACKENDS)
      found = {name for name in imports(path) if name.startswith(names)}
      assert not found, path.name


def test_only_plots_import_matplotlib():
  found = [
    path.name
    for path in FILES.values()
    if any(name.split('.', 1)[0] == 'matplotlib' for name in imports(path))
  ]
  assert found
  assert all(name.startswith('plot') for name in found), found


def test_only_the_bench_of_attention_imports_a_peer():
  for path in files_of('aot'):
    if path.stem != 'peers':
      assert not any(n.startswith('tokamax') for n in imports(path)), path.name


def test_training_reads_without_gates_and_kernels():
  # Only the optimizer's table of parameters has a row for them.
  word = re.compile(r'\b(gates?|gated|splash|cudnn|pallas)\b')
  for path in files_of('training'):
    if path.stem != 'optimizer':
      assert not word.search(path.read_text()), path.name
