"""Checkpoints as folders: where they lie, how to read, check and write one.

A checkpoint holds `params`, arrays that Orbax writes, and `run`, a JSON file
with the config of the run, dtype, shape and sum of every array, and a digest of
all that. Whoever reads arrays compares their sums, so a file that was damaged
without becoming unreadable is found: for decoding, exporting and measuring as
for a run that goes on. What did not train may lie in another checkpoint, the
base: see gated_jax/base.py. A training run keeps its optimizer and its place in
the data beside them: see gated_jax/training/checkpoints.py.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from gated_jax import damage
from gated_jax import paths
from gated_jax.base import Base
from gated_jax.base import NoBase
from gated_jax.base import base_in
from gated_jax.base import digest_of
from gated_jax.base import divide
from gated_jax.base import join
from gated_jax.base import locate
from gated_jax.bucket_requests import BucketError
from gated_jax.bucket_requests import bucket_error
from gated_jax.bucket_requests import cause_in_bucket
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.config import to_dict
from gated_jax.config import upgrade
from gated_jax.paths import Path
from gated_jax.paths import expand

Tree = Any
TOKENIZER = 'tokenizer'  # the folder of one that travels with a checkpoint
# By array: dtype, shape, sum.
Records = Mapping[str, list[Any]]
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


# One array at a time: a CPU writes the terms of a sum down before it adds them
# up, and those of all arrays at once would be a second model.
@jax.jit
def _sum(x: jax.Array) -> jax.Array:
  """The sum that `records` describes: each element counts by its place."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place * jnp.uint32(size) + index
  return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))


def array_names(tree: Tree, item: str) -> list[str]:
  """'item/path/of/array' for every array, in the order of the leaves."""

  def word(key: Any) -> str:
    """A key of a path, whichever kind of node it is of."""
    for name in ('key', 'idx', 'name'):
      if hasattr(key, name):
        return str(getattr(key, name))
    return str(key)

  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return ['/'.join([item, *(word(key) for key in path)]) for path in paths]


def records(tree: Tree, item: str) -> dict[str, list[Any]]:
  """Name of each array of a tree to its dtype, shape and sum.

  The sum is that of an array's bits, word by word, each times an odd number
  that follows from its place, modulo 2^32: one flipped bit always changes it,
  words that changed places nearly always. It is the same however an array is
  sharded, and costs one pass over what the devices hold anyway.

  Args:
    tree: arrays of any sharding; all processes call this.
    item: what the names begin with: the folder that holds the arrays.
  """
  leaves = jax.tree.leaves(tree)
  totals = [jax.device_get(_sum(x)) for x in leaves]
  return {
    name: [str(x.dtype), list(x.shape), int(total)]
    for name, x, total in zip(
      array_names(tree, item), leaves, totals, strict=True
    )
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


def check_finite(folder: Path, params: Tree) -> None:
  """CheckpointError where a parameter holds NaN or infinity."""
  finite = [jax.device_get(_finite(x)) for x in jax.tree.leaves(params)]
  names = array_names(params, 'params')
  bad = [name for name, good in zip(names, finite, strict=True) if not good]
  if bad:
    raise CheckpointError(
      f'{folder} holds numbers that are not finite in {bad[0]}: nothing can be '
      'made of it'
    )


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


def load_config(path: str | os.PathLike[str]) -> RunConfig:
  """The config of the run that wrote a checkpoint.

  A tokenizer in the checkpoint's folder is its tokenizer, wherever the folder
  was when the config was written.

  Raises:
    ValueError: there is no checkpoint, or it has settings of another version.
    CheckpointError: it is damaged.
  """
  folder = find(path)
  values = read_run(folder)['config']
  try:
    config = from_dict(upgrade(values))
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  if not paths.is_folder(folder / TOKENIZER):
    return config
  name = str(paths.absolute(folder / TOKENIZER))
  data = dataclasses.replace(config.data, tokenizer=name)
  return dataclasses.replace(config, data=data)


def save_parameters(
  path: str | os.PathLike[str], params: Tree, config: RunConfig
) -> None:
  """Writes a checkpoint of parameters alone, whole or not at all.

  `load_parameters` reads it, so a run can start from it; none can resume.

  Args:
    path: A new folder.
    params: Arrays of any placement.
    config: Settings of the run; its model is the one of the parameters.
  """
  folder = paths.absolute(expand(path))
  check_place(folder)
  paths.check_bucket(folder)
  if paths.exists(folder):
    raise ValueError(f'{path} exists; choose another name or remove it')
  run = {'config': to_dict(config), 'arrays': records(params, 'params')}
  args = ocp.args.Composite(
    params=ocp.args.PyTreeSave(params),
    run=ocp.args.JsonSave(seal(run)),
  )
  try:
    with ocp.Checkpointer(_one_by_one(params)) as writer:
      writer.save(os.fspath(folder), args=args)
    if jax.process_index() == 0:
      damage.write_list(folder)
  except Exception as error:
    raise CheckpointError(
      f'could not write {path}: {one_line(error)}'
    ) from error


def _one_by_one(params: Tree) -> ocp.CompositeCheckpointHandler:
  """A handler whose buffers hold an array or two, not all of `params`."""
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  # Fractions of a gigabyte are fine. A part that is read is rounded up to whole
  # chunks, and more than there is room for would be an error.
  write: Any = 1.1 * largest / 10**9
  read: Any = 2 * largest / 10**9
  return ocp.CompositeCheckpointHandler(
    params=ocp.PyTreeCheckpointHandler(
      save_concurrent_gb=write, restore_concurrent_gb=read
    ),
    run=ocp.JsonCheckpointHandler(),
  )


def read_arrays(
  folder: Path,
  items: Mapping[str, Tree],
  handler: ocp.CompositeCheckpointHandler | None = None,
  partial: bool = False,
) -> dict[str, Tree]:
  """The arrays of some items of a checkpoint, unchecked.

  Processes do not wait for each other here: one that cannot read its part
  raises, and can tell the others. (A Checkpointer of Orbax's would wait.)

  Args:
    folder: the checkpoint.
    items: item to shapes, dtypes and shardings of its arrays.
    handler: which reads them; None: one that reads them all at once.
    partial: True: the items may hold other arrays too.
  """
  handler = handler or ocp.CompositeCheckpointHandler()
  args = {
    item: ocp.args.PyTreeRestore(
      tree,
      ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=partial,
    )
    for item, tree in items.items()
  }
  try:
    restored = handler.restore(
      epath.Path(paths.absolute(folder)), args=ocp.args.Composite(**args)
    )
    return {item: restored[item] for item in items}
  finally:
    handler.close()


def load_parameters(
  path: str | os.PathLike[str], abstract: Tree, sparing: bool = False
) -> Tree:
  """Parameters alone, with the shapes, dtypes and shardings of `abstract`.

  Args:
    path: a checkpoint.
    abstract: as above.
    sparing: reads one array after the other, which is slower and holds little
      beside the parameters.

  Raises:
    ValueError: there is no checkpoint, or one of another model.
    CheckpointError: it is damaged, or holds numbers that are not finite.
  """
  folder = find(path)
  run = read_run(folder)
  stored = run.get('arrays') or _from_orbax(folder)
  _check_shapes(folder, stored, abstract)
  params = _read_parameters(folder, run, _as_stored(stored, abstract), sparing)
  check_finite(folder, params)
  return jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract)


def _as_stored(stored: Records, abstract: Tree) -> Tree:
  """The same arrays in the dtypes that were saved, which their sums are of."""
  names = iter(array_names(abstract, 'params'))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      jnp.dtype(stored[next(names)][0]),
      sharding=getattr(x, 'sharding', None),
    ),
    abstract,
  )


def _read_parameters(
  folder: Path,
  run: Mapping[str, Any],
  exact: Tree,
  sparing: bool,
  partial: bool = False,
) -> Tree:
  """Parameters of a checkpoint and its base, compared with their sums.

  Args:
    folder: of the checkpoint.
    run: its `run` file.
    exact: shapes, dtypes as saved, and shardings.
    sparing: reads one array after the other.
    partial: True: `exact` may lack some of the parameters.
  """
  recorded = run.get('arrays')
  base = base_in(run)
  own, rest = divide(exact, base)
  try:
    handler = _one_by_one(own) if sparing or partial else None
    params = read_arrays(folder, {'params': own}, handler, partial)['params']
  except Exception as error:
    cause = cause_in_bucket(error)
    if cause is not None:  # what cannot be reached may be good
      raise bucket_error(cause, folder) or error from error
    raise damaged(folder, error) from error
  check_arrays(folder, records(params, 'params'), recorded)
  if base is None or not rest:
    return params
  place = find_base(folder, run)
  return join(params, read_base(folder, run, rest, place, sparing))


def read_base(
  folder: Path,
  run: Mapping[str, Any],
  exact: Tree,
  place: Path,
  sparing: bool = False,
) -> Tree:
  """The parameters that a checkpoint leaves with its base.

  Args:
    folder: of the checkpoint.
    run: its `run` file.
    exact: shapes, dtypes as the run had them, and shardings.
    place: folder of the base, from `find_base`.
    sparing: reads one array after the other.

  Raises:
    NoBase: the base is another one.
    CheckpointError: it is damaged.
  """
  there = read_run(place)
  stored = there.get('arrays') or _from_orbax(place)
  lacks = sorted(set(array_names(exact, 'params')) - set(stored))
  if lacks:
    raise NoBase(f'{place} is not the base of {folder}: it lacks {lacks[0]}')
  params = _read_parameters(
    place, there, _as_stored(stored, exact), sparing, partial=True
  )
  params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, exact)
  recorded = run['arrays']
  for name, x in records(params, 'params').items():
    if recorded[name] != x:
      raise NoBase(
        f'{place} is not the base of {folder}: {name} differs from what was '
        'trained on'
      )
  return params


def find_base(
  folder: Path, run: Mapping[str, Any], also: Iterable[str] = ()
) -> Path:
  """The folder of a checkpoint's base; NoBase where it is not there.

  Args:
    folder: of the checkpoint.
    run: its `run` file, which names a base.
    also: where to look first.
  """
  base = base_in(run)
  assert base is not None, f'{folder} is whole'
  return locate(base, folder, also, _digest_at)


def _digest_at(path: str) -> tuple[Path, str]:
  """The checkpoint at a path, and the digest of its parameters."""
  folder = find(path)
  return folder, digest_of(read_run(folder).get('arrays'))


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
  stored = recorded or _from_orbax(folder)

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


def _from_orbax(folder: Path) -> Records:
  """Dtypes and shapes as Orbax knows them, of checkpoints without sums."""
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


def _check_shapes(folder: Path, stored: Records, abstract: Tree) -> None:
  """ValueError naming parameters that only one side has, or of other shapes."""
  names = array_names(abstract, 'params')
  here = dict(zip(names, jax.tree.leaves(abstract), strict=True))
  shapes_here = {name: tuple(x.shape) for name, x in here.items()}
  shapes_there = {
    name: tuple(shape)
    for name, (_, shape, _) in stored.items()
    if name.startswith('params/')
  }
  wrong = [
    f'{name.removeprefix("params/")} is {shapes_there.get(name, "absent")} '
    f'there and {shapes_here.get(name, "absent")} here'
    for name in sorted({*shapes_there, *shapes_here})
    if shapes_there.get(name) != shapes_here.get(name)
  ]
  if wrong:
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise ValueError(
      f'{folder} holds another model: {"; ".join(wrong[:3])}{more}'
    )
