"""New folders, which are there whole or not at all, on a disk or in a bucket.

On a disk a folder is written under another name and renamed when it is
complete. A bucket cannot rename one: while a folder is written there, an object
beside it says so, and what makes others read it is written last.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from collections.abc import Iterator

from gated_jax import paths
from gated_jax.paths import Path

# Without these nothing reads a folder of theirs.
LAST = ('config.json', 'adapter_config.json')

Send = Callable[[pathlib.Path], None]


def _mark(path: Path) -> Path:
  """The name of what stands beside a folder while it is written."""
  return path.with_name(f'.{path.name}.partial')


def check_free(path: Path) -> None:
  """ValueError where there is something at a path, or nothing can be there."""
  if isinstance(path, pathlib.Path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise ValueError(f'{path} exists; choose another name or remove it')
    return
  if not os.fspath(path).partition('://')[2].partition('/')[2]:
    raise ValueError(f'{path} is a whole bucket: name a folder in it')
  paths.check_bucket(path)
  if paths.exists(path) and not paths.exists(_mark(path)):
    raise ValueError(f'{path} exists; choose another name or remove it')


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[tuple[pathlib.Path, Send]]:
  """A local folder to write into, which becomes `path` when the block succeeds.

  Yields:
    The folder, and what may be called with a file in it that is complete: a
    large one then takes no room here any more.

  Raises:
    ValueError: there is something at `path`, or it cannot be written to.
  """
  check_free(path)
  if not isinstance(path, pathlib.Path):
    with uploading(path), tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)

      def send(file: pathlib.Path) -> None:
        """Moves a file into the bucket."""
        paths.upload(file, path / file.relative_to(folder).as_posix())
        file.unlink()

      yield folder, send
      files = [file for file in folder.rglob('*') if file.is_file()]
      for file in sorted(files, key=lambda file: (file.name in LAST, file)):
        send(file)
    return
  partial = _mark(path)
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise ValueError(f'cannot write to {path}: {error.strerror}') from None
  try:
    yield partial, lambda _: None
    partial.replace(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def uploading(path: Path) -> Iterator[None]:
  """Inside, a folder in a bucket is written; it goes where that fails.

  What is left of one whose process was killed goes first.

  Raises:
    ValueError: it cannot be written to.
  """
  mark = _mark(path)
  try:
    unfinished = paths.exists(mark)
    paths.write_bytes(mark, b'')
  except OSError as error:
    raise ValueError(f'cannot write to {path}: {error}') from None
  if unfinished:
    paths.remove_folder(path)
  try:
    yield
  except BaseException:
    paths.remove_folder(path)
    raise
  finally:
    mark.unlink()
