"""The parameters of a checkpoint, written and read with those of its base.

What was read is compared with the sums that were saved: for decoding, exporting
and measuring as for a run that goes on.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from gated_jax import damage
from gated_jax import paths
from gated_jax.bucket_requests import bucket_error
from gated_jax.bucket_requests import cause_in_bucket
from gated_jax.checkpoint.base import NoBase
from gated_jax.checkpoint.base import base_in
from gated_jax.checkpoint.base import divide
from gated_jax.checkpoint.base import find_base
from gated_jax.checkpoint.base import join
from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import check_arrays
from gated_jax.checkpoint.folder import check_place
from gated_jax.checkpoint.folder import damaged
from gated_jax.checkpoint.folder import find
from gated_jax.checkpoint.folder import one_line
from gated_jax.checkpoint.folder import read_run
from gated_jax.checkpoint.folder import seal
from gated_jax.checkpoint.folder import stored_arrays
from gated_jax.checkpoint.sums import Records
from gated_jax.checkpoint.sums import array_names
from gated_jax.checkpoint.sums import not_finite
from gated_jax.checkpoint.sums import records
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.config import to_dict
from gated_jax.config import upgrade
from gated_jax.paths import Path
from gated_jax.paths import expand

Tree = Any
TOKENIZER = 'tokenizer'  # the folder of one that travels with a checkpoint


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
  stored = stored_arrays(folder, run)
  _check_shapes(folder, stored, abstract)
  params = _read_parameters(folder, run, _as_stored(stored, abstract), sparing)
  _check_finite(folder, params)
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
    if cause is not None:  # a file out of reach may be good
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
  stored = stored_arrays(place, there)
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


def _check_finite(folder: Path, params: Tree) -> None:
  """CheckpointError where a parameter holds NaN or infinity."""
  bad = not_finite(params, 'params')
  if bad:
    raise CheckpointError(
      f'{folder} holds numbers that are not finite in {bad[0]}: nothing can be '
      'made of it'
    )


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
