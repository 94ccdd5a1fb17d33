"""The adapters of a model of ours, as PEFT loads them onto its base.

save('path/of/a/new/folder', params, config, 'qwen3_5')
"""

import math
import os
import pathlib
import re
from collections.abc import Callable
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
from gated_jax.hf.files import DTYPES
from gated_jax.hf.files import write_json
from gated_jax.hf.names import Tensor
from gated_jax.hf.names import tensors
from gated_jax.hf.new_folder import whole_folder
from gated_jax.hf.peft import CONFIG
from gated_jax.hf.peft import PREFIX
from gated_jax.hf.peft import SIDES
from gated_jax.hf.peft import thin
from gated_jax.model import adapters
from gated_jax.model.low_rank import NAMES
from gated_jax.paths import expand

Tree = Any


def save(
  folder: str | os.PathLike[str],
  params: Tree,
  config: ModelConfig,
  family: str,
  base: str = '',
  dtype: str = '',
  more: Callable[[pathlib.Path], None] = lambda _: None,
) -> None:
  """Writes the adapters of a model alone, whole or not at all.

  Where there are several processes, all call it and the first one writes.

  Args:
    folder: New, or empty.
    params: Of the model with its adapters.
    config: Of that model.
    family: The name of the one that the base is exported as.
    base: Name or folder that PEFT loads the base from; '': it is not said.
    dtype: Tensors are stored in; '': float32.
    more: Writes what else belongs into the folder, before it is complete.
  """
  kind = family_named(family)
  arrays, ranks = _arrays(params, config, kind)
  folder = expand(folder)
  convert.agree_on(folder)
  if jax.process_index() != 0:
    return
  from safetensors.numpy import save_file

  stored = DTYPES[dtype or 'float32']
  with whole_folder(folder) as (partial, _):
    save_file(
      {name: x.astype(stored, copy=False) for name, x in arrays.items()},
      partial / ADAPTER_FILES[0].weights,
      metadata={'format': 'pt'},
    )
    values = describe(config.lora, ranks, kind)
    if config.lora.dropout != values['lora_dropout']:
      print(
        f'{CONFIG} is without lora_dropout={config.lora.dropout}, which PEFT '
        'does not take beside target_parameters'
      )
    write_json(
      partial / CONFIG, values | {'base_model_name_or_path': base or None}
    )
    more(partial)


def _arrays(
  params: Tree, config: ModelConfig, family: Family
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """The arrays of the file, and the rank of every tensor's adapter.

  The rank is 0 for a matrix that has none.
  """
  flat = convert.flatten(params)
  shapes = convert.shapes_of(adapters.without(params))
  paths = {'/'.join(path) for path in adapters.adapted(config)}
  rows = thin.joined_rows(family)
  whole = tensors(rows, adapters.plain(config), shapes)
  listed = {t.name: t for t in whole if paths & set(t.leaves)}
  ranks = {t.name: 0 for t in whole if t.row.inputs}
  arrays: dict[str, np.ndarray] = {}
  for name, tensor in listed.items():
    sides = thin.to_theirs(tensor, _of(tensor, flat, paths))
    ranks[name] = len(sides.a) // thin.experts(tensor)
    key = PREFIX + thin.module(name, listed)
    arrays |= {key + side: x for side, x in zip(SIDES, sides, strict=True)}
  return arrays, ranks


def _of(
  tensor: Tensor, flat: Mapping[str, Any], paths: set[str]
) -> dict[str, thin.Thin]:
  """The adapters of the matrices that a tensor holds, on the host."""
  return {
    path: thin.Thin(*(convert.get(flat[path + x], tensor.at) for x in NAMES))
    for path in tensor.leaves
    if path in paths
  }


def describe(
  lora: LoraConfig, ranks: Mapping[str, int], family: Family
) -> dict[str, Any]:
  """An adapter_config.json.

  Args:
    lora: Of the model.
    ranks: Of every matrix of theirs, by name; 0 where it has no adapter.
    family: Of the base.
  """
  by_target = {thin.target(name, family): r for name, r in ranks.items()}
  shown = _shortened(by_target, family)
  other = {name: rank for name, rank in shown.items() if rank != lora.rank}
  power = 0.5 if lora.rank_stabilized else 1.0
  parameters = sorted(name for name in shown if thin.is_parameter(name))
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'r': lora.rank,
    'lora_alpha': _number(lora.alpha),
    'use_rslora': lora.rank_stabilized,
    'rank_pattern': other,
    'alpha_pattern': {
      name: _number(lora.alpha * (rank / lora.rank) ** power)
      for name, rank in other.items()
    },
    # Without a list PEFT takes the modules that it knows of.
    'target_modules': sorted(set(shown) - set(parameters)),
    'target_parameters': parameters or None,
    # PEFT refuses one beside adapters that it adds to their parameters.
    'lora_dropout': 0.0 if parameters else lora.dropout,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
  }


def _number(x: float) -> float:
  """The same number, as an integer where it is one: PEFT's alphas are."""
  return int(x) if math.isfinite(x) and x == int(x) else x


def _shortened(ranks: Mapping[str, int], family: Family) -> dict[str, int]:
  """Ranks by name, one name for all layers where all of them have the same.

  A name without its layer is of any module that ends so. Those of a vision
  tower may, so names are whole where the class has one.
  """
  kinds: dict[str, list[str]] = {}
  for name in ranks:
    kind = re.sub(r'^model\.(language_model\.)?layers\.\d+\.', '', name)
    kinds.setdefault(kind, []).append(name)
  shown: dict[str, int] = {}
  for kind, names in kinds.items():
    different = {ranks[name] for name in names}
    if len(different) == 1 and not family.inside:
      names = [kind]
      ranks = {**ranks, kind: different.pop()}
    shown |= {name: ranks[name] for name in names if ranks[name]}
  return shown
