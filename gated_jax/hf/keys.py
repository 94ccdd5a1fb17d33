"""The words of a config.json that families have in common.

Every key is taken once and must be understood, or known not to matter: a key
that is passed over in silence is a model with other logits. Read
`gated_jax/hf/families/` next.
"""

import math
import reprlib
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import NoReturn

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig

# Their key to our setting, where the value is the same.
SAME = {
  'vocab_size': 'vocab',
  'max_position_embeddings': 'length',
  'num_hidden_layers': 'depth',
  'hidden_size': 'width',
  'num_attention_heads': 'heads',
  'num_key_value_heads': 'kv_heads',
  'head_dim': 'head_dim',
  'intermediate_size': 'mlp_width',
}
LARGEST = 2**31 - 1  # devices count in int32
# Keys with the only value that the decoder computes; absent means that too.
FIXED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'attention_dropout': 0.0,
  'is_encoder_decoder': False,
  'quantization_config': None,
}
# Keys that change no logits.
INERT = {
  'architectures',
  'auto_map',
  'model_type',
  'transformers_version',
  'torchscript',
  'tokenizer_class',
  'use_cache',
  'output_router_logits',
  'output_attentions',
  'output_hidden_states',
  'return_dict',
  '_name_or_path',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'chunk_size_feed_forward',
  'id2label',
  'label2id',
  'problem_type',
}
# Those of rope_parameters; of three equal positions (text) a mixture is one.
_ROPE_INERT = {'mrope_section', 'mrope_interleaved'}


class Keys:
  """A config.json whose keys are taken one by one, so that none is missed."""

  def __init__(self, values: Mapping[str, Any], where: str = 'config.json'):
    self._left = dict(values)
    self.taken: dict[str, Any] = {}  # keys that were taken so far
    self.where = where

  def take(self, key: str, *default: Any) -> Any:
    """A required key, or one with a default; null is the default too."""
    value = self._left.pop(key, None)
    if value is None:
      if not default:
        raise ValueError(f'{self.where} has no {key}')
      value = default[0]
    self.taken[key] = value
    return value

  def integer(self, key: str, *default: Any, least: int = 1) -> Any:
    """An integer of at least `least`; a default may be of any type."""
    value = self._peek(key)
    if value is not None and not (
      type(value) is int and least <= value <= LARGEST
    ):
      self._refuse(key, f'an integer from {least} to {LARGEST}')
    return self.take(key, *default)

  def number(self, key: str, *default: Any) -> Any:
    """A finite number, as a float; a default may be of any type."""
    value = self._peek(key)
    if value is None:
      return self.take(key, *default)
    try:
      finite = type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
      finite = False
    if not finite:
      self._refuse(key, 'a finite number')
    return float(self.take(key))

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    if not isinstance(self._peek(key), bool | None):
      self._refuse(key, 'true or false')
    return self.take(key, default)

  def sequence(self, key: str, kind: type, default: list[Any]) -> list[Any]:
    """A list of values of one type."""
    value = self._peek(key)
    if value is not None and not (
      isinstance(value, list) and all(type(item) is kind for item in value)
    ):
      self._refuse(key, f'a list of {kind.__name__}')
    return self.take(key, default)

  def fill(self, key: str, other: str) -> None:
    """Gives a key that is absent the value of another one."""
    if self._peek(key) is None and other in self._left:
      self._left[key] = self._left[other]

  def _peek(self, key: str) -> Any:
    return self._left.get(key)

  def _refuse(self, key: str, expected: str) -> NoReturn:
    value = reprlib.repr(self._peek(key))
    raise ValueError(f'{self.where} has {key}={value}, which is not {expected}')

  def expect(self, key: str, value: Any, why: str = '') -> None:
    """ValueError where a key says anything else; absent says the same."""
    taken = self.take(key, value)
    if taken != value:
      reason = f': {why}' if why else ''
      raise ValueError(
        f'{self.where} has {key}={reprlib.repr(taken)}, and the decoder only '
        f'{value!r}{reason}'
      )

  def finish(self, inert: Collection[str]) -> None:
    """ValueError for what nobody took."""
    for key, value in self._left.items():
      if key not in inert and value is not None:
        raise ValueError(
          f'{self.where} has {key}={reprlib.repr(value)}, which is not known '
          f'here; if it changes no logits, name it with --ignore={key}'
        )


def read_common(keys: Keys) -> dict[str, Any]:
  """Settings that every family spells alike."""
  for key, value in FIXED.items():
    keys.expect(key, value)
  # Where all layers have experts there need not be an MLP's width.
  keys.fill('intermediate_size', 'moe_intermediate_size')
  values = {ours: keys.integer(theirs) for theirs, ours in SAME.items()}
  return values | {
    'norm_eps': keys.number('rms_norm_eps'),
    'tie_embeddings': keys.flag('tie_word_embeddings', False),
    'init_std': keys.number('initializer_range', 0.02),
    'dtype': keys.take('dtype', keys.take('torch_dtype', 'float32')),
  }


def write_common(config: ModelConfig) -> dict[str, Any]:
  """The inverse, but for the dtype, which is that of the files."""
  return {
    **{theirs: getattr(config, ours) for theirs, ours in SAME.items()},
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'use_cache': True,
  }


def read_rope(keys: Keys, length: int, fraction: float) -> dict[str, Any]:
  """The rotary settings, from rope_parameters or the older pair of keys.

  Args:
    keys: Of config.json.
    length: max_position_embeddings.
    fraction: partial_rotary_factor where it is absent.
  """
  # Where both are there, the classes of transformers let rope_scaling win.
  scaling, inside = (
    keys.take('rope_scaling', {}),
    keys.take('rope_parameters', {}),
  )
  if not isinstance(scaling, dict) or not isinstance(inside, dict):
    raise ValueError(f'{keys.where}: rope parameters are no object')
  rope = Keys(scaling or inside, f'rope parameters of {keys.where}')
  outer = keys.number('rope_theta', None)
  fraction = keys.number('partial_rotary_factor', fraction)
  kind = rope.take('rope_type', rope.take('type', 'default'))
  values = {
    'base': rope.number('rope_theta', *([] if outer is None else [outer])),
    'fraction': rope.number('partial_rotary_factor', fraction),
    'scaling': 'none' if kind == 'default' else kind,
  }
  if kind == 'yarn':
    original = rope.integer('original_max_position_embeddings', length)
    values |= {
      'original_length': original,
      'factor': rope.number('factor', length / original),
      'truncate': rope.flag('truncate', True),
    }
    for key in ('beta_fast', 'beta_slow', *_YARN_OPTIONAL):
      values[key] = rope.number(key, getattr(RopeConfig(), key))
  elif kind == 'linear':
    values['factor'] = rope.number('factor')
  elif kind != 'default':
    raise ValueError(
      f'{rope.where} are of rope_type {reprlib.repr(kind)}, and the decoder '
      'has default, linear and yarn'
    )
  rope.finish(_ROPE_INERT)
  return values


_YARN_OPTIONAL = ('attention_factor', 'mscale', 'mscale_all_dim')


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """The older spelling, which newer software reads as well."""
  values: dict[str, Any] = {
    'rope_theta': rope.base,
    'partial_rotary_factor': rope.fraction,
    'rope_scaling': None,
  }
  if rope.scaling == 'none':
    return values
  scaling: dict[str, Any] = {'rope_type': rope.scaling, 'factor': rope.factor}
  if rope.scaling == 'yarn':
    scaling |= {
      'original_max_position_embeddings': rope.original_length,
      'beta_fast': rope.beta_fast,
      'beta_slow': rope.beta_slow,
      'truncate': rope.truncate,
    }
    scaling |= {k: getattr(rope, k) for k in _YARN_OPTIONAL if getattr(rope, k)}
  return values | {'rope_scaling': scaling}


def read_layer_types(
  keys: Keys,
  default: list[str],
  window: int | None,
  full: str = 'attention',
  linear: str = '',
) -> list[str]:
  """The word of every layer, from a type for each.

  Args:
    keys: Of config.json.
    default: The types where the key is absent; as long as there are layers.
    window: Of sliding layers; None: there may be none.
    full: The word of a layer that sees all tokens before it.
    linear: Of linear attention; '': there may be none.
  """
  types = keys.sequence('layer_types', str, default)
  if len(types) != len(default):
    raise ValueError(
      f'{keys.where} has {len(types)} layer_types for '
      f'num_hidden_layers={len(default)}'
    )
  words = {'full_attention': full}
  if window is not None:
    sliding = f'attention:window={window}' if window else 'attention'
    words['sliding_attention'] = sliding
  if linear:
    words['linear_attention'] = linear
  for layer, kind in enumerate(types):
    if kind not in words:
      raise ValueError(
        f'{keys.where}: layer {layer} is {reprlib.repr(kind)}, and the decoder '
        f'has {" and ".join(words)} here'
      )
  return [words[kind] for kind in types]


def layer_type(layer: LayerSpec) -> str:
  """The name of a type of layers."""
  if layer.mixer == 'gated_deltanet':
    return 'linear_attention'
  return 'sliding_attention' if layer.window else 'full_attention'


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
  """A type for each layer, and one window, which reading back compares."""
  return {
    'layer_types': [layer_type(layer) for layer in config.layers],
    'sliding_window': max(layer.window for layer in config.layers) or None,
  }
