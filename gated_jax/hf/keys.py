"""The words of a config.json that families have in common.

Every key is taken once and must be understood, or known not to matter: a key
that is passed over in silence is a model with other logits. Read
`gated_jax/hf/families/` next.
"""

import fnmatch
import math
import reprlib
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import NoReturn

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig

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
  # Of training, and of windows where a family has none that begin with a layer.
  'router_aux_loss_coef',
  'max_window_layers',
}


# Keys that change nothing where they say this, in a family that has none of it.
OFF = {
  'decoder_sparse_step': 1,
  'mlp_bias': False,
  'mlp_only_layers': [],
  'num_nextn_predict_layers': 0,
  'pretraining_tp': 1,
  'qkv_bias': False,
  'use_mrope': False,
  'use_sliding_window': False,
}


class Keys:
  """A config.json whose keys are taken one by one, so that none is missed.

  Attributes:
    taken: Keys that were taken so far.
    refused: What the decoder cannot compute, each in words, so that all of it
      can be said at once.
    where: What is read, in words.
  """

  def __init__(
    self,
    values: Mapping[str, Any],
    where: str = 'config.json',
    spelled: Mapping[str, str] | None = None,
  ):
    self._spelled = dict(spelled or {})
    common = {own: key for key, own in self._spelled.items()}
    self._left = {common.get(key, key): value for key, value in values.items()}
    self.taken: dict[str, Any] = {}
    self.refused: list[str] = []
    self.where = where

  def take(self, key: str, *default: Any) -> Any:
    """A required key, or one with a default; null is the default too."""
    value = self._left.pop(key, None)
    if value is None:
      if not default:
        raise ValueError(f'{self.where} has no {self.word(key)}')
      value = default[0]
    self.taken[key] = value
    return value

  def integer(self, key: str, *default: Any, least: int = 1) -> Any:
    """An integer of at least `least`; a default may be of any type."""
    value = self.peek(key)
    if value is not None and not (
      type(value) is int and least <= value <= LARGEST
    ):
      self._refuse(key, f'an integer from {least} to {LARGEST}')
    return self.take(key, *default)

  def number(self, key: str, *default: Any) -> Any:
    """A finite number, as a float; a default may be of any type."""
    value = self.peek(key)
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
    if not isinstance(self.peek(key), bool | None):
      self._refuse(key, 'true or false')
    return self.take(key, default)

  def sequence(self, key: str, kind: type, default: list[Any]) -> list[Any]:
    """A list of values of one type."""
    value = self.peek(key)
    if value is not None and not (
      isinstance(value, list) and all(type(item) is kind for item in value)
    ):
      self._refuse(key, f'a list of {kind.__name__}')
    return self.take(key, default)

  def fill(self, key: str, other: str) -> None:
    """Gives a key that is absent the value of another one."""
    if self.peek(key) is None and other in self._left:
      self._left[key] = self._left[other]

  def divide(self, key: str, whole: str, parts: str) -> None:
    """Gives a key that is absent the quotient of two others."""
    total, number = self.peek(whole), self.peek(parts)
    if self.peek(key) is None and type(total) is type(number) is int and number:
      self._left[key] = total // number

  def numbers(self, key: str, default: list[float]) -> list[float]:
    """A list of finite numbers, as floats; a null in it is zero."""
    value = self.peek(key)
    if value is None:
      return self.take(key, default)
    plain = isinstance(value, list) and all(
      item is None or (type(item) in (int, float) and abs(item) <= LARGEST)
      for item in value
    )
    if not plain:
      self._refuse(key, 'a list of finite numbers')
    return [float(item or 0) for item in self.take(key)]

  def inner(self, key: str) -> 'Keys':
    """The keys of an object inside; none where it is absent."""
    value = self.peek(key)
    if not isinstance(value, dict | None):
      self._refuse(key, 'an object')
    return Keys(self.take(key, {}), f'{key} of {self.where}')

  def rest(self) -> dict[str, Any]:
    """The keys that nobody has taken."""
    return dict(self._left)

  def word(self, key: str) -> str:
    """A key as the file spells it."""
    return self._spelled.get(key, key)

  def peek(self, key: str) -> Any:
    """The value of a key, which is not taken; None where it is absent."""
    return self._left.get(key)

  def _refuse(self, key: str, expected: str) -> NoReturn:
    value = reprlib.repr(self.peek(key))
    raise ValueError(
      f'{self.where} has {self.word(key)}={value}, which is not {expected}'
    )

  def expect(self, key: str, value: Any, why: str = '') -> None:
    """Refuses a key that says anything else; absent says the same."""
    taken = self.take(key, value)
    if taken != value:
      reason = f': {why}' if why else ''
      self.refused.append(
        f'{self.where} has {key}={reprlib.repr(taken)}, and the decoder only '
        f'{value!r}{reason}'
      )

  def refuse(self, reason: str) -> None:
    """Notes what the decoder cannot compute, in words."""
    self.refused.append(f'{self.where}{reason}')

  def finish(self, inert: Collection[str]) -> None:
    """Refuses what nobody took, but for keys of these names or patterns."""
    for key, value in self._left.items():
      # Layers that predict several tokens at once have keys of this beginning.
      idle = key.startswith('mtp_') or (key in OFF and OFF[key] == value)
      idle = idle or any(fnmatch.fnmatchcase(key, name) for name in inert)
      if value is not None and not idle:
        self.refused.append(
          f'{self.where} has {key}={reprlib.repr(value)}, which is not known '
          f'here; if it changes no logits, name it with --ignore={key}'
        )


def read_common(
  keys: Keys, inert: Collection[str], tied: bool
) -> dict[str, Any]:
  """Settings that all families have.

  Args:
    keys: Of config.json.
    inert: Keys that the family does not read.
    tied: tie_word_embeddings where it is absent.
  """
  for key, value in FIXED.items():
    if key not in inert:
      keys.expect(key, value)
  # A model whose layers all have experts need not say an MLP's width.
  keys.fill('intermediate_size', 'moe_intermediate_size')
  required = (*SAME, 'rms_norm_eps')
  missing = [keys.word(key) for key in required if keys.peek(key) is None]
  if missing:
    raise ValueError(f'{keys.where} has no {", ".join(missing)}')
  values = {ours: keys.integer(theirs) for theirs, ours in SAME.items()}
  biases = keys.flag('attention_bias', False)
  return values | {
    'qkv_bias': biases,
    'out_bias': biases,
    'norm_eps': keys.number('rms_norm_eps'),
    'tie_embeddings': keys.flag('tie_word_embeddings', tied),
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
    'attention_bias': config.qkv_bias,
    'attention_dropout': 0.0,
    'use_cache': True,
  }


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
  words = {'full_attention': full}
  if window is not None:
    sliding = f'attention:window={window}' if window else 'attention'
    words['sliding_attention'] = sliding
  if linear:
    words['linear_attention'] = linear
  types = read_types(keys, 'layer_types', default, words)
  return [words[kind] for kind in types]


def read_types(
  keys: Keys,
  key: str,
  default: list[str],
  known: Collection[str],
  beyond: int = 0,
) -> list[str]:
  """A type for each layer; those not known are refused, and the first known.

  Args:
    keys: Of config.json.
    key: That has them.
    default: The types where it is absent; as long as there are layers.
    known: What they may be.
    beyond: How many more there may be at the end, which are passed over.
  """
  types, depth = keys.sequence(key, str, default), len(default)
  types = types[:depth] if len(types) == depth + beyond else types
  if len(types) != depth:
    raise ValueError(
      f'{keys.where} has {len(types)} {key} for num_hidden_layers={depth}'
    )
  for layer, kind in enumerate(types):
    if kind not in known:
      keys.refuse(
        f': layer {layer} is {reprlib.repr(kind)}, and the decoder has '
        f'{" and ".join(known)} here'
      )
      break
  first = next(iter(known))
  return [kind if kind in known else first for kind in types]


_MIXER_TYPES = {'gated_deltanet': 'linear_attention', 'short_conv': 'conv'}


def layer_type(layer: LayerSpec) -> str:
  """The name of a type of layers."""
  if layer.mixer in _MIXER_TYPES:
    return _MIXER_TYPES[layer.mixer]
  return 'sliding_attention' if layer.window else 'full_attention'


def write_deltanet(config: ModelConfig) -> dict[str, Any]:
  """Sizes of Gated DeltaNet, and a type for each layer of both kinds."""
  delta = config.delta
  return {
    'layer_types': write_layer_types(config)['layer_types'],
    'linear_num_key_heads': delta.key_heads,
    'linear_num_value_heads': delta.value_heads,
    'linear_key_head_dim': delta.key_dim,
    'linear_value_head_dim': delta.value_dim,
    'linear_conv_kernel_dim': delta.filter_width,
  }


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
  """A type for each layer, and one window, which reading back compares."""
  return {
    'layer_types': [layer_type(layer) for layer in config.layers],
    'sliding_window': max(layer.window for layer in config.layers) or None,
  }
