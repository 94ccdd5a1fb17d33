"""Rotary embeddings in a config.json: one for all layers, or one for each type.

Files say them in two ways: `rope_parameters`, for all layers or by type of
layer, and the older `rope_theta`, `rope_scaling` and `partial_rotary_factor`.
Where no base is said it is 10,000, as in the classes of transformers.
"""

import reprlib
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import RopeConfig
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import layer_type


def read_rope(
  keys: Keys, length: int, fraction: float, base: float = RopeConfig().base
) -> dict[str, Any]:
  """The rotary settings, from rope_parameters or the older keys.

  Args:
    keys: Of config.json.
    length: max_position_embeddings.
    fraction: partial_rotary_factor where it is absent.
    base: rope_theta where it is absent.
  """
  # The classes of transformers let rope_scaling win where both are there.
  scaling, inside = (
    keys.take('rope_scaling', {}),
    keys.take('rope_parameters', {}),
  )
  if not isinstance(scaling, dict) or not isinstance(inside, dict):
    raise ValueError(f'{keys.where}: rope parameters are no object')
  rope = Keys(scaling or inside, f'rope parameters of {keys.where}')
  base = keys.number('rope_theta', base)
  fraction = keys.number('partial_rotary_factor', fraction)
  values = _read(rope, length, base, fraction)
  keys.refused += rope.refused
  return values


def _read(
  rope: Keys, length: int, base: float, fraction: float
) -> dict[str, Any]:
  """The settings of one rotary embedding; defaults as the callers have them."""
  kind = rope.take('rope_type', rope.take('type', 'default'))
  values = {
    'base': rope.number('rope_theta', base),
    'fraction': rope.number('partial_rotary_factor', fraction),
    'scaling': 'none' if kind == 'default' else kind,
  }
  if kind in ('yarn', 'llama3'):
    original = rope.integer('original_max_position_embeddings', length)
    values['original_length'] = original
    values['factor'] = rope.number('factor', length / original)
  if kind == 'yarn':
    values['truncate'] = rope.flag('truncate', True)
    for key in ('beta_fast', 'beta_slow', *_YARN_OPTIONAL):
      values[key] = rope.number(key, getattr(RopeConfig(), key))
  elif kind == 'llama3':
    values |= {ours: rope.number(key) for key, ours in _LLAMA3.items()}
  elif kind == 'linear':
    values['factor'] = rope.number('factor')
  elif kind == 'proportional':
    values['factor'] = rope.number('factor', 1.0)
  elif kind != 'default':
    rope.refuse(
      f' are of rope_type {reprlib.repr(kind)}, and the decoder has default, '
      'linear, yarn, llama3 and proportional'
    )
    return {}
  rope.finish(_INERT)
  return values


def read_ropes(
  keys: Keys,
  length: int,
  types: Iterable[str],
  defaults: Mapping[str, Mapping[str, Any]],
) -> dict[str, RopeConfig | None]:
  """The rotary embedding of each type of layer; None: it has none.

  Args:
    keys: Of config.json.
    length: max_position_embeddings.
    types: Of the layers.
    defaults: Of each type, what stands in rope_parameters where that is absent.
  """
  by_type = keys.take('rope_parameters', dict(defaults))
  if not isinstance(by_type, dict):
    raise ValueError(f'{keys.where}: rope parameters are no object')
  ropes: dict[str, RopeConfig | None] = {}
  for kind in dict.fromkeys(types):
    if kind not in by_type:
      raise ValueError(f'{keys.where} has no rope_parameters of {kind}')
    values = by_type[kind]
    if not isinstance(values, dict | None):
      raise ValueError(f'{keys.where}: rope parameters of {kind} are no object')
    if values is None:
      ropes[kind] = None
      continue
    rope = Keys(values, f'rope parameters of {kind} of {keys.where}')
    ropes[kind] = RopeConfig(**_read(rope, length, RopeConfig().base, 1.0))
    keys.refused += rope.refused
  stretched = {r for r in ropes.values() if r and r.scaling != 'none'}
  if len(stretched) > 1:
    keys.refuse(': its types of layers stretch rotary embeddings differently')
  return ropes


def widest(ropes: Iterable[RopeConfig | None]) -> RopeConfig:
  """The rotary embedding from which words can make all of these."""
  used = [rope for rope in ropes if rope is not None]
  stretched = [rope for rope in used if rope.scaling != 'none']
  return next(iter(stretched or used), RopeConfig())


_YARN_OPTIONAL = ('attention_factor', 'mscale', 'mscale_all_dim')
_LLAMA3 = {'low_freq_factor': 'low_turns', 'high_freq_factor': 'high_turns'}
# Text has three equal positions, of which any mixture is the same.
_INERT = {'mrope_section', 'mrope_interleaved'}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """The older spelling, which newer software reads as well."""
  scaling = _write_scaling(rope)
  return {
    'rope_theta': rope.base,
    'partial_rotary_factor': rope.fraction,
    'rope_scaling': scaling or None,
  }


def write_nested_rope(rope: RopeConfig) -> dict[str, Any]:
  """The newer spelling, of all layers, for a class that turns whole heads."""
  values = {'rope_type': 'default', 'rope_theta': rope.base}
  return {'rope_parameters': values | _write_scaling(rope)}


def write_ropes(layers: Iterable[LayerSpec]) -> dict[str, Any]:
  """The newer spelling, by type of the layers that attend."""
  by_type: dict[str, Any] = {}
  for layer in layers:
    if not layer.attends:
      continue
    kind, rope = layer_type(layer), layer.rope
    by_type[kind] = rope and {
      'rope_type': 'default',
      'rope_theta': rope.base,
      'partial_rotary_factor': rope.fraction,
      **_write_scaling(rope),
    }
  return {'rope_parameters': by_type}


def _write_scaling(rope: RopeConfig) -> dict[str, Any]:
  """The keys that stretch a rotary embedding; none where nothing does."""
  if rope.scaling == 'none':
    return {}
  scaling: dict[str, Any] = {'rope_type': rope.scaling, 'factor': rope.factor}
  if rope.scaling in ('yarn', 'llama3'):
    scaling['original_max_position_embeddings'] = rope.original_length
  if rope.scaling == 'llama3':
    scaling |= {key: getattr(rope, ours) for key, ours in _LLAMA3.items()}
  if rope.scaling == 'yarn':
    scaling |= {
      'beta_fast': rope.beta_fast,
      'beta_slow': rope.beta_slow,
      'truncate': rope.truncate,
    }
    scaling |= {k: getattr(rope, k) for k in _YARN_OPTIONAL if getattr(rope, k)}
  return scaling
