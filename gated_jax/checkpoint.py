"""Checkpoints as folders: where they lie, and how to read and write one.

A checkpoint holds `params`, arrays that Orbax writes, and `run`, a JSON file
with the config of the run. This is all that decoding, exporting and measuring
a model need. A training run keeps its optimizer and its place in the data
beside them: see gated_jax/training/checkpoints.py.
"""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp

from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.config import to_dict

Tree = Any


class CheckpointError(RuntimeError):
  """A checkpoint that could not be written, or none that could be read."""


def one_line(error: BaseException) -> str:
  """The gist of an error whose text may fill a screen."""
  text = ' '.join(str(error).split())
  system = re.search(r'([^:\[\]]+) \[os_error_code', text)
  if system:
    return system[1].strip()
  return text if len(text) < 200 else f'{text[:120]} ... {text[-80:]}'


def find(path: str | pathlib.Path) -> pathlib.Path:
  """A step's folder, given it, its `checkpoints` folder or the workdir."""
  given = pathlib.Path(path)
  if (given / 'params').is_dir():
    return given
  for folder in (given / 'checkpoints', given):
    steps = [p for p in folder.glob('*') if p.name.isdigit()]
    if steps:
      return max(steps, key=lambda p: int(p.name))
  raise ValueError(f'no checkpoint at {path}')


def save_parameters(
  path: str | pathlib.Path, params: Tree, config: RunConfig
) -> None:
  """Writes a checkpoint of parameters alone, whole or not at all.

  `load_parameters` reads it, so a run can start from it; none can resume.

  Args:
    path: A new folder.
    params: Arrays of any placement.
    config: Settings of the run; its model is the one of the parameters.
  """
  folder = pathlib.Path(path).absolute()
  if folder.exists():
    raise ValueError(f'{path} exists; choose another name or remove it')
  args = ocp.args.Composite(
    params=ocp.args.StandardSave(params),
    run=ocp.args.JsonSave({'config': to_dict(config)}),
  )
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
      writer.save(folder, args=args)
  except Exception as error:
    raise CheckpointError(
      f'could not write {path}: {one_line(error)}'
    ) from error


def load_config(path: str | pathlib.Path) -> RunConfig:
  """The config of the run that wrote a checkpoint."""
  folder = find(path)
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      run = reader.restore((folder / 'run').absolute())
    return from_dict(run['config'])
  except Exception as error:
    raise CheckpointError(f'{folder} is damaged: {one_line(error)}') from error


def load_parameters(path: str | pathlib.Path, abstract: Tree) -> Tree:
  """Parameters alone, with the shapes, dtypes and shardings of `abstract`."""
  folder = find(path)
  _check_shapes(folder, abstract)
  try:
    with ocp.StandardCheckpointer() as reader:
      return reader.restore((folder / 'params').absolute(), abstract)
  except Exception as error:
    raise CheckpointError(f'{folder} is damaged: {one_line(error)}') from error


def _check_shapes(folder: pathlib.Path, abstract: Tree) -> None:
  """ValueError naming parameters that only one side has, or of other shapes."""
  try:
    with ocp.StandardCheckpointer() as reader:
      there = _shapes(
        reader.metadata((folder / 'params').absolute()).item_metadata.tree
      )
  except Exception as error:
    raise CheckpointError(f'{folder} is damaged: {one_line(error)}') from error
  here = _shapes(abstract)
  wrong = [
    f'{name} is {there.get(name, "absent")} there and '
    f'{here.get(name, "absent")} here'
    for name in sorted({*there, *here})
    if there.get(name) != here.get(name)
  ]
  if wrong:
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise ValueError(
      f'{folder} holds another model: {"; ".join(wrong[:3])}{more}'
    )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
  def name(path: Iterable[Any]) -> str:
    return '/'.join(str(getattr(p, 'key', p)) for p in path)

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name(path): tuple(leaf.shape) for path, leaf in leaves}
