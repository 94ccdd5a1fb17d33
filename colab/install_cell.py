# @title Installs gated_jax where it is missing, and says what it did
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

# The Git address that the package comes from where it is not near at hand:
# as a clone, or as a gated_jax-*.whl or .tar.gz that was uploaded.
REPOSITORY = ''
EXTRAS = ('hf', 'plot')
KEPT = ('jax', 'jaxlib', 'flax', 'numpy')  # never replaced by older ones


def version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ''


def colab_opened() -> str:
  """The repository on GitHub that Colab opened this notebook from, or ''."""
  if not {'COLAB_JUPYTER_IP', 'KMP_TARGET_PORT'} <= os.environ.keys():
    return ''
  url = 'http://{COLAB_JUPYTER_IP}:{KMP_TARGET_PORT}/api/sessions'
  try:
    with urllib.request.urlopen(url.format(**os.environ)) as answer:
      opened = urllib.parse.unquote(json.load(answer)[0]['path'])
  except (OSError, ValueError, LookupError):
    return ''
  match = re.search(r'github(?:\.com)?/([^/]+/[^/]+)/blob', opened)
  return f'https://github.com/{match[1]}' if match else ''


def source() -> str:
  """What pip is given: a folder, a file, or an address."""
  here = pathlib.Path.cwd()
  for folder in (here, *here.parents, here / 'gated_jax'):
    if (folder / 'gated_jax' / '__init__.py').exists():
      return str(folder)
  for pattern in ('gated_jax-*.whl', 'gated_jax-*.tar.gz'):
    if files := sorted(here.glob(pattern)):
      return str(files[-1])
  if address := REPOSITORY or colab_opened():
    return f'git+{address}'
  raise ValueError(
    'gated_jax is not here. Upload its wheel, clone it, or set REPOSITORY'
  )


def for_this_machine() -> list[str]:
  """JAX with the plugin that it has, or that this machine's devices need."""
  plugins = {'cuda13': 'jax-cuda13-plugin', 'cuda12': 'jax-cuda12-plugin'}
  for extra, name in (*plugins.items(), ('tpu', 'libtpu')):
    if version(name):
      return [f'jax[{extra}]']
  if 'TPU_ACCELERATOR_TYPE' in os.environ or os.path.exists('/dev/accel0'):
    return ['jax[tpu]']
  try:
    smi = subprocess.run(
      ['nvidia-smi'], capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    return []
  cuda = re.search(r'CUDA Version: (\d+)', smi.stdout)
  return [f'jax[cuda{min(13, int(cuda[1]))}]'] if cuda else []


def pip(*words: str) -> bool:
  command = [sys.executable, '-m', 'pip', 'install', '-q', *words]
  return subprocess.run(command, check=False).returncode == 0


def out_of_bounds() -> str:
  """The lines in which pip says which versions gated_jax does not ask for."""
  command = [sys.executable, '-m', 'pip', 'check']
  text = subprocess.run(command, check=False, capture_output=True, text=True)
  return '\n'.join(re.findall(r'^gated[_-]jax .*', text.stdout, re.MULTILINE))


def beside_a_newer_jax(place: str, *limits: str) -> bool:
  """Installs the package though it says that JAX or Flax here is too new."""
  if not pip('--no-deps', place):
    return False
  needed = []
  for line in importlib.metadata.requires('gated_jax') or ():
    requirement, _, marker = line.partition(';')
    extra = re.search(r'extra == "(\w+)"', marker)
    if extra is None or extra[1] in EXTRAS:
      needed.append(requirement.strip())
  return pip(*limits, *(n for n in needed if re.split(r'\W', n)[0] not in KEPT))


def install() -> None:
  before = {name: version(name) for name in KEPT if version(name)}
  place = source()
  print(f'gated_jax is missing: installing it from {place}, in a minute or so')
  address = place if '://' in place else pathlib.Path(place).as_uri()
  wanted = f'gated_jax[{",".join(EXTRAS)}] @ {address}'
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'no_older.txt')
    lines = [f'{name}>={v.partition("+")[0]}' for name, v in before.items()]
    file.write_text('\n'.join(lines))
    limits = ('-c', str(file))
    if not pip(*limits, wanted, *for_this_machine()):
      if not beside_a_newer_jax(place, *limits):
        raise RuntimeError('pip could not install gated_jax: its lines say why')
      print(
        f'kept, though gated_jax was not tested with it:\n{out_of_bounds()}'
      )
  importlib.invalidate_caches()
  changed = [name for name, old in before.items() if version(name) != old]
  for name in KEPT:
    old = f'was {before.get(name) or "missing"}'
    kept = name in before and name not in changed
    print(f'  {name} {version(name)}, {"as it was" if kept else old}')
  if any(name in sys.modules for name in changed):
    print('Restart the session: other versions of these were imported before')


# A folder called gated_jax has a spec too, but no file that it was read from.
spec = importlib.util.find_spec('gated_jax')
if spec is None or spec.origin is None:
  install()
print(f'gated_jax {version("gated_jax")} with jax {version("jax")}')
