"""Finds the folders of checkpoints, and reads their records of themselves.

A folder holds `params`, arrays that Orbax writes, and `run`, a JSON file with
the config of the run, the record of every array (sums.py) and a digest of all
that.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gated_jax import damage
from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.checkpoint.sums import Records
from gated_jax.checkpoint.sums import array_names
from gated_jax.paths import Path
from gated_jax.paths import expand

RUN = 'run/metadata'  # Orbax's JSON handler chose the name
COMMIT = 'commit_success.txt'  # Orbax's name, in buckets alone
_LOG = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint that could not be written, or none that could be read."""


def one_line(error: BaseException) -> str:
  """The gist of an error whose text may fill a screen."""
  text = ' '.join(str(error).split())
  system = re.search(r'([^:\[\]]+) \[os_error_code', text)
  if system:
    return system[1].strip()
  # TensorStore says the cause last, before a description of the whole array.
  text = text.split(' [tensorstore_spec')[0].split('", "')[-1]
  text = re.sub(r'^.*"[^"]*/": ', '', text)
  return text if len(text) < 200 else f'{text[:120]} ... {text[-80:]}'


def damaged(
  folder: Path, error: BaseException, arrays: list[str] | None = None
) -> CheckpointError:
  """The error to raise for a checkpoint that did not read as it was saved."""
  files = damage.name_files(folder, error, arrays or [])
  where = f' in {files}' if files else ''
  return CheckpointError(f'{folder} is damaged{where}: {one_line(error)}')


def steps_in(folder: Path) -> list[int]:
  """The steps whose folders lie in a folder, in order.

  Whatever else lies there is left alone: notes, steps that were put aside or
  that a killed run was about to write.
  """
  if not paths.is_folder(folder):
    return []
  with paths.requests_to(folder):
    entries = list(folder.iterdir())
  return sorted(
    int(path.name)
    for path in entries
    if re.fullmatch('0|[1-9][0-9]*', path.name) and is_whole(path)
  )


def is_whole(folder: Path) -> bool:
  """Tells whether a folder is of a save that came to its end.

  On a disk Orbax renames it then. In a bucket it lies under its own name from
  the beginning, and the last object to be written says that it is complete.
  """
  if isinstance(folder, pathlib.Path):
    return folder.is_dir()
  return paths.exists(folder / COMMIT)


def check_place(path: Path) -> None:
  """ValueError where no checkpoint can lie: Orbax has no such storage.

  It opens TensorStore's driver of Cloud Storage for gs://, and takes any other
  address for a relative path of a disk.
  """
  if paths.in_bucket(path) and not os.fspath(path).startswith('gs://'):
    raise ValueError(
      f'{path}: Orbax writes and reads checkpoints on disks and in gs:// alone'
    )


def find(path: str | os.PathLike[str]) -> Path:
  """A step's folder, given it, its `checkpoints` folder or the workdir."""
  given = expand(path)
  check_place(given)
  if paths.is_folder(given / 'params') and is_whole(given):
    return given
  for folder in (given / 'checkpoints', given):
    steps = steps_in(folder)
    if steps:
      return folder / str(steps[-1])
  paths.check_bucket(given)
  raise ValueError(f'no checkpoint at {path}')


def _digest(run: Mapping[str, Any]) -> str:
  """A digest of JSON values, whether they were read or are to be written."""
  return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def seal(run: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a `run` file with the digest that `read_run` compares."""
  return {**run, 'digest': _digest(run)}


def read_run(folder: Path) -> dict[str, Any]:
  """The values of a checkpoint's `run` file.

  Raises:
    CheckpointError: the file cannot be read or is not what was saved.
    BucketError: its bucket does not answer.
  """
  path = folder / RUN
  try:
    run = json.loads(paths.read_bytes(path))
    if not isinstance(run, dict) or 'config' not in run:
      raise ValueError('no settings')
    # Only files from before there were sums have no digest.
    digest = run.pop('digest', None)
    if digest != _digest(run) and (digest or 'arrays' in run):
      raise ValueError('contents differ from what was saved')
  except BucketError:
    raise
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or one_line(error)
    raise CheckpointError(f'{folder} is damaged in {RUN}: {reason}') from error
  return run


def stored_arrays(folder: Path, run: Mapping[str, Any]) -> Records:
  """The records of a checkpoint's arrays; of an old one those of Orbax.

  Those have dtypes and shapes, and 0 in place of a sum.

  Raises:
    CheckpointError: it is damaged.
  """
  if run.get('arrays'):
    return run['arrays']
  try:
    reader = ocp.PyTreeCheckpointHandler()
    tree = reader.metadata(epath.Path(paths.absolute(folder / 'params')))
    reader.close()
  except Exception as error:
    raise damaged(folder, error) from error
  names = array_names(tree, 'params')
  return {
    name: [str(x.dtype), list(x.shape), 0]
    for name, x in zip(names, jax.tree.leaves(tree), strict=True)
  }


def check_arrays(
  folder: Path, found: Records, recorded: Records | None
) -> None:
  """CheckpointError where arrays are not those that were saved.

  Args:
    folder: the checkpoint that they were read from.
    found: the records of arrays of one or more of its items.
    recorded: the `arrays` of its `run` file; None: it is older than those.
  """
  if recorded is None:
    _LOG.warning(
      '%s is from before checkpoints kept sums of their arrays: it is used as '
      'it was read',
      folder,
    )
    return
  wrong = [name for name, x in found.items() if recorded.get(name) != x]
  if wrong:
    shown = ', '.join(wrong[:3])
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    reason = ValueError(f'{shown}{more} differ from what was saved')
    raise damaged(folder, reason, wrong)
