"""Adapters of PEFT's form, beside the parameters of their base.

    config, params = load('path/of/an/adapter', base_config, base, 'qwen3_5')

Where a tensor of theirs has no adapter and layers of ours lie in one array, the
adapter of that layer is zero on both sides: it changes nothing and no gradient
ever moves it.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gated_jax.config import LoraConfig
from gated_jax.config import ModelConfig
from gated_jax.hf import convert
from gated_jax.hf.config import family_named
from gated_jax.hf.families import Family
from gated_jax.hf.files import ADAPTER_FILES
from gated_jax.hf.files import TensorFiles
from gated_jax.hf.files import read_json
from gated_jax.hf.names import Tensor
from gated_jax.hf.names import tensors
from gated_jax.hf.peft import CONFIG
from gated_jax.hf.peft import PREFIX
from gated_jax.hf.peft import SIDES
from gated_jax.hf.peft import thin
from gated_jax.hf.peft.settings import Settings
from gated_jax.hf.peft.settings import read_settings
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.low_rank import NAMES
from gated_jax.paths import expand

Tree = Any
# The place of a matrix: the path of its parameter, and layer and expert in it.
Place = tuple[str, tuple[int, ...]]
_SHOWN = 3  # tensors that one message names


def load(
  folder: str | os.PathLike[str],
  config: ModelConfig,
  base: Tree,
  family: str,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, Tree]:
  """A model with the adapters of a folder.

  Args:
    folder: With adapter_config.json and weights.
    config: Of the base, which has no adapters.
    base: Its parameters, of any placement.
    family: The name of the one that the base is exported as.
    mesh: Where adapters are placed; None: on the first device.

  Raises:
    ValueError: something is missing, damaged, beyond what adapters here do, or
      belongs to another base; the message names it.
  """
  folder = expand(folder)
  settings = read_settings(read_json(folder / CONFIG))
  files = TensorFiles(folder, ADAPTER_FILES)
  shapes = convert.shapes_of(base)
  table = _best_table(family_named(family), config, shapes, files)
  sides = _used(table, _read(table, files, settings, family_named(family)))
  rank = max(side.rank for side in sides.values())
  stack = {path: t.row.stack for t in table.values() for path in t.leaves}
  lora = _lora(config, set(stack) & {path for path, _ in sides}, rank, settings)
  config = dataclasses.replace(config, lora=lora)
  abstract = convert.flatten(abstract_parameters(config, mesh))
  arrays = {
    path + name: np.zeros(abstract[path + name].shape, np.float32)
    for path in {path for path, _ in sides}
    for name in NAMES
  }
  for (path, at), side in sides.items():
    for name, x in zip(NAMES, side.padded(rank, stack[path]), strict=True):
      arrays[path + name][at] = x
  placed = {
    path: jax.make_array_from_callback(
      x.shape, abstract[path].sharding, x.__getitem__
    )
    for path, x in arrays.items()
  }
  return config, adapters.put(base, convert.unflatten(placed))


def _best_table(
  family: Family,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  files: TensorFiles,
) -> dict[str, Tensor]:
  """Their tensors by the names of adapters, as the files follow them best.

  Raises:
    ValueError: the files hold what no table names.
  """
  rows_of_b = {
    _short(name, family): shape[0]
    for name, shape in files.shapes.items()
    if name.endswith(SIDES[1]) and shape
  }
  shorts = {name: _short(name, family) for name in files.shapes}
  tables = [
    {
      _key(tensor, rows_of_b): tensor
      for tensor in tensors(rows, config, shapes)
      if _may_have_one(tensor)
    }
    for rows in (thin.joined_rows(family), family.rows, *family.other_rows)
  ]
  table = max(
    tables, key=lambda table: sum(x in table for x in shorts.values())
  )
  strange = sorted(k for k, short in shorts.items() if short not in table)
  if strange or not shorts:
    rest = len(strange) - _SHOWN
    more = f' and {rest} more' if rest > 0 else ''
    raise ValueError(
      f'{files.folder}: {", ".join(strange[:_SHOWN]) or "an empty file"}{more} '
      'adapts no matrix of this base'
    )
  return {short: table[short] for short in dict.fromkeys(shorts.values())}


def _may_have_one(tensor: Tensor) -> bool:
  """True for a matrix of a layer."""
  row = tensor.row
  return bool(row.inputs) and not row.filter and '{layer}' in row.theirs


def _short(name: str, family: Family) -> str:
  """The name of an adapter without its side; '' for what is none.

  Where a module has another name than its tensors, either may stand in the
  file. Whether the model stands inside of a larger one makes no difference.
  """
  for side in SIDES:
    if name.startswith(PREFIX) and name.endswith(side):
      short = _language(name.removeprefix(PREFIX).removesuffix(side))
      for old, new in family.modules:
        short = short.replace(new, old)
      return short
  return ''


def _language(name: str) -> str:
  return name.replace('model.language_model.', 'model.')


def _in_patterns(tensor: Tensor, family: Family) -> set[str]:
  """The names that a tensor may have in patterns, which are of modules."""
  module = thin.target(tensor.name, family)
  alone = _language(module)
  inside = alone.replace('model.', 'model.language_model.', 1)
  return {tensor.name, module, alone, inside}


def _key(tensor: Tensor, rows: Mapping[str, int]) -> str:
  """The name that a tensor's adapter has in the files, without its side.

  Args:
    tensor: Of the base.
    rows: Of the adapters' B, by name.
  """
  name = _language(tensor.name)
  module, _, last = name.rpartition('.')
  if last == 'weight':
    return module
  inner = f'{module}.base_layer'
  if inner in rows:
    return inner if last == 'gate_up_proj' else module
  # One of the two parameters is adapted, and its rows tell which.
  return module if rows.get(module) == tensor.shape[-2] else name


def _read(
  table: Mapping[str, Tensor],
  files: TensorFiles,
  settings: Settings,
  family: Family,
) -> dict[Place, thin.Thin]:
  """The adapters of our matrices, each with the scale of the model's."""
  names = {
    (_short(name, family), name.endswith(SIDES[0])): name
    for name in files.shapes
  }
  sides: dict[Place, thin.Thin] = {}
  for short, tensor in table.items():
    if len({(short, True), (short, False)} & set(names)) < 2:
      raise ValueError(
        f'{files.folder}: the adapter of {tensor.name} lacks one of its sides'
      )
    a, b = (names[short, first] for first in (True, False))
    expected = thin.shapes(tensor, files.shapes[a])
    for name, shape in zip((a, b), expected, strict=True):
      if files.shapes[name] != shape or 0 in shape:
        raise ValueError(
          f'{files.folder} is an adapter for another base: {name} is '
          f'{list(files.shapes[name])}, and this base makes it {list(shape)}'
        )
    whole = thin.Thin(*(files.read(name).astype(np.float32) for name in (a, b)))
    rank = len(whole.a) // thin.experts(tensor)
    scale = settings.scale(_in_patterns(tensor, family), rank)
    factor = scale / settings.model_scale
    for path, side in thin.to_ours(tensor, whole, settings.rank).items():
      sides[path, tensor.at] = side._replace(b=side.b * np.float32(factor))
  return sides


def _used(
  table: Mapping[str, Tensor], sides: Mapping[Place, thin.Thin]
) -> dict[Place, thin.Thin]:
  """Without those of matrices that a joint tensor's adapter leaves alone.

  They are zero in every layer, where those beside them are not.
  """
  moved = {path for (path, _), side in sides.items() if side.b.any()}
  joint = {
    path
    for tensor in table.values()
    if moved & set(tensor.leaves)
    for path in tensor.leaves
  }
  return {
    place: side
    for place, side in sides.items()
    if place[0] in moved or place[0] not in joint
  }


def _lora(
  config: ModelConfig, paths: set[str], rank: int, settings: Settings
) -> LoraConfig:
  """The settings of the model's adapters."""
  lora = LoraConfig(
    rank=rank,
    alpha=settings.alpha_for(rank),
    rank_stabilized=settings.rank_stabilized,
  )
  every = adapters.adapted(dataclasses.replace(config, lora=lora))
  chosen = [every[path] for path in every if '/'.join(path) in paths]
  if not all(about.of_experts for about in chosen):
    lora = dataclasses.replace(lora, dropout=settings.dropout)
  if paths == {'/'.join(path) for path in every}:
    return lora
  return dataclasses.replace(lora, matrices=','.join(sorted(paths)))
