"""config.json to ModelConfig and back.

What a family cannot say of ours needs no list: `write_config` reads back
what it wrote, and whatever comes back different has no words there.
"""

import math
import reprlib
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import different_function
from gated_jax.config import from_dict
from gated_jax.hf.families import FAMILIES
from gated_jax.hf.families import NOT_YET
from gated_jax.hf.families import Family
from gated_jax.hf.keys import INERT
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_common
from gated_jax.hf.keys import write_common
from gated_jax.hf.rope import read_rope
from gated_jax.hf.rope import write_nested_rope
from gated_jax.hf.rope import write_rope


def family_named(name: str) -> Family:
  """ValueError with all names where there is none of this name."""
  for family in FAMILIES:
    if family.name == name:
      return family
  known = ', '.join(family.name for family in FAMILIES)
  raise ValueError(f'there is no family {name!r}; there are {known}')


def find_family(values: Mapping[str, Any]) -> Family:
  """The family that a config.json is of."""
  for family in FAMILIES:
    named = Keys(values).sequence('architectures', str, [])
    if family.marks & set(values) and family.architecture in named:
      return family
  kind = values.get('model_type')
  if kind is None:
    raise ValueError('config.json has no model_type')
  for family in FAMILIES:
    if kind in (family.model_type, family.inside) and not family.marks:
      return family
  if isinstance(kind, str) and kind in NOT_YET:
    raise ValueError(
      f'config.json has model_type {kind!r}, which the decoder cannot compute: '
      f'{NOT_YET[kind]}'
    )
  known = ', '.join(sorted({family.model_type for family in FAMILIES}))
  raise ValueError(
    f'config.json has model_type {reprlib.repr(kind)}; only {known} can be read'
  )


def _language_keys(
  values: Mapping[str, Any], family: Family, ignore: Sequence[str]
) -> Keys:
  """The keys of the language model, which may stand inside `text_config`."""
  if not family.inside or 'text_config' not in values:
    return Keys(_renamed(values, family), spelled=family.spelled)
  inner = values['text_config']
  if not isinstance(inner, dict):
    raise ValueError(
      f'config.json has text_config={reprlib.repr(inner)}, which is no object'
    )
  # Said at the top, inside, or in both places.
  both = {key: values[key] for key in _OUTSIDE if values.get(key) is not None}
  for key, value in both.items():
    if inner.get(key, value) not in (None, value):
      raise ValueError(
        f'config.json has {key}={value!r}, and its text_config {inner[key]!r}'
      )
  outer = Keys({k: v for k, v in values.items() if k not in _OUTSIDE})
  outer.finish({*INERT, *family.around, *ignore, 'text_config'})
  stated = {k: v for k, v in inner.items() if v is not None}
  keys = Keys(
    _renamed(both | stated, family),
    'text_config of config.json',
    family.spelled,
  )
  keys.refused = outer.refused
  return keys


def _renamed(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """The values, older names of keys replaced by those that are read."""
  return {family.aliases.get(key, key): value for key, value in values.items()}


_OUTSIDE = ('tie_word_embeddings', 'dtype', 'torch_dtype')


def read_config(
  values: Mapping[str, Any],
  family: Family,
  ignore: Sequence[str] = (),
  shapes: Collection[Sequence[int]] | None = None,
) -> ModelConfig:
  """The model that a config.json describes.

  Args:
    values: Contents of config.json.
    family: The result of `find_family`.
    ignore: Keys that are not known here and change no logits.
    shapes: Of the tensors in the model's files; None: there are none. Sizes
      are compared with them before anything is made of a size.

  Raises:
    ValueError: a key is missing, of a wrong type, not known, or says what the
      decoder cannot compute.
  """
  keys = _language_keys(values, family, ignore)
  try:
    settings = _read_settings(keys, family, shapes)
    keys.finish({*INERT, *family.inert, *ignore})
    config = from_dict(settings, ModelConfig(), 'model.')
    if shapes is not None:
      axes = (axis for shape in shapes if math.prod(shape) for axis in shape)
      most = max(axes, default=0)
      if config.has_experts:
        experts = {'num_experts': config.moe.experts}
        _check_sizes(experts, max(len(shapes), most))
      _check_sizes(_axes(config), most)
  except ValueError as error:
    # The error that stops the reading comes before what was refused until then.
    raise ValueError('; '.join([str(error), *keys.refused])) from None
  if keys.refused:
    raise ValueError('; '.join(keys.refused))
  return config


def _read_settings(
  keys: Keys, family: Family, shapes: Collection[Sequence[int]] | None
) -> dict[str, Any]:
  """Settings as plain values; what is refused stands in `keys` afterwards."""
  outside, keys.refused = keys.refused, []
  if family.divides_width:
    keys.divide('head_dim', 'hidden_size', 'num_attention_heads')
    keys.fill('num_key_value_heads', 'num_attention_heads')
  settings = read_common(keys, family.inert, family.tied)
  depth, length = settings['depth'], settings['length']
  if shapes is not None:
    _check_sizes({'num_hidden_layers': depth}, len(shapes))
  if not family.rope_by_type:
    rope = _read_rope(keys, length, family)
    settings['rope'] = rope
    if family.fraction == 1 and rope.get('fraction', 1) != 1:
      keys.refuse(
        f' has partial_rotary_factor={rope["fraction"]}, which '
        f'{family.architecture} does not read'
      )
  # Refusals of this family weigh more than those that all families share.
  common, keys.refused = keys.refused, []
  try:
    return settings | family.read(keys, depth)
  finally:
    keys.refused += common + outside


def _read_rope(keys: Keys, length: int, family: Family) -> dict[str, Any]:
  """The rotary embedding of all layers."""
  if not family.theta:
    return read_rope(keys, length, family.fraction)
  if keys.peek('rope_parameters') is None:
    for key in ('rope_theta', 'rope_scaling'):
      if keys.peek(key) is not None:
        keys.refuse(
          f' has {key}={reprlib.repr(keys.peek(key))} and no rope_parameters, '
          f'without which {family.architecture} reads none of it'
        )
  return read_rope(keys, length, family.fraction, family.theta)


def _axes(config: ModelConfig) -> dict[str, int]:
  """Sizes that are axes of some tensor, by their names in config.json."""
  ffns = {layer.ffn for layer in config.distinct_layers}
  mixers = {layer.mixer for layer in config.distinct_layers}
  delta = config.delta
  return {
    'vocab_size': config.vocab,
    'hidden_size': config.width,
    'num_attention_heads x head_dim': config.heads * config.head_dim,
    'num_key_value_heads x head_dim': config.kv_heads * config.head_dim,
    **(
      {'conv_L_cache': config.conv.filter_width}
      if 'short_conv' in mixers
      else {}
    ),
    **(
      {
        'linear_num_key_heads x linear_key_head_dim': delta.key_heads
        * delta.key_dim,
        'linear_num_value_heads x linear_value_head_dim': delta.value_heads
        * delta.value_dim,
        'linear_conv_kernel_dim': delta.filter_width,
      }
      if 'gated_deltanet' in mixers
      else {}
    ),
    **({'intermediate_size': config.mlp_width} if 'mlp' in ffns else {}),
    **({'moe_intermediate_size': config.moe.width} if 'moe' in ffns else {}),
    **({'moe_hidden_size': config.moe.reduced_width} if 'moe' in ffns else {}),
  }


def _check_sizes(sizes: Mapping[str, int], most: int) -> None:
  for name, size in sizes.items():
    if size > most:
      raise ValueError(
        f'config.json has {name}={size}, and the tensors of its files allow '
        f'{most} at most'
      )


def write_config(config: ModelConfig, family: Family) -> dict[str, Any]:
  """A config.json; ValueError naming the settings it has no words for."""
  if family.write is None:
    raise ValueError(
      f'{family.name} is only read: its files hold more than a language model'
    )
  inner = {
    **write_common(config),
    **_write_rope(config, family),
    **family.write(config),
  }
  inner = {family.spelled.get(key, key): x for key, x in inner.items()}
  if family.fraction == 1:  # a class that does not read it
    inner.pop('partial_rotary_factor', None)
  values: dict[str, Any] = {
    'architectures': [family.architecture],
    'model_type': family.model_type,
  }
  if family.inside:
    values |= {
      'text_config': {'model_type': family.inside, **inner},
      'tie_word_embeddings': config.tie_embeddings,
      **{
        key: value(config) if callable(value) else value
        for key, value in family.around.items()
      },
    }
  else:
    values |= inner
  try:
    changed = different_function(config, read_config(values, family))
  except ValueError as error:
    raise ValueError(
      f'{family.name} has no words for this model: {error}'
    ) from None
  if changed:
    shown = ', '.join(
      f'model.{name}={old!r}' for name, (old, _) in changed.items()
    )
    raise ValueError(f'{family.name} has no words for {shown}')
  return values


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Keys of the rotary embedding, where all layers have the same."""
  if family.rope_by_type:
    return {}
  write = write_nested_rope if family.theta else write_rope
  return write(config.rope)


def choose_family(config: ModelConfig, first: str = '') -> Family:
  """The first that can describe a model; ValueError with all reasons.

  Args:
    config: Of the model.
    first: The name of one that is tried before the others.
  """
  reasons = []
  for family in sorted(FAMILIES, key=lambda family: family.name != first):
    if family.write is None:
      continue
    try:
      write_config(config, family)
    except ValueError as error:
      reasons.append(str(error))
      continue
    return family
  shown = '\n  '.join(reasons)
  raise ValueError(f'no family describes this model:\n  {shown}')
