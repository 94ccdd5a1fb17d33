"""A layer, described once: which mixer, how far it sees, what follows it.

A layer is written as a word, so that a flag can override it:

    MIXER[:FIELD,...][+FFN[:FIELD,...]]       FIELD is NAME=VALUE, or nope

    attention                       the model's own sizes, then its MLP
    attention:window=512,nope       512 keys, no rotary embedding
    attention:heads=96+moe          more query heads, then experts
    attention:rope_scaling=none     a rotary embedding that is not stretched
    attention+moe:limit=7           SwiGLU of the experts clamped at 7
    attention:norm=post             norms of the blocks' outputs alone

What the word leaves out is the model's: `heads`, `kv_heads`, `head_dim`,
`rope`, `norm` and `mlp_width` of ModelConfig, `width` of MoEConfig. Which
mixers there are is the table in `gated_jax/model/mixers/__init__.py`.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from gated_jax.config.checks import choice
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.layers import RopeConfig

FFNS = ('mlp', 'moe')
# Where norms stand: before both blocks of a layer, after both, or around them.
NORMS = ('pre', 'post', 'sandwich')


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer of a decoder."""

  mixer: str  # its word in the table of mixers
  window: int  # keys a query sees, itself included; 0: all before it
  rope: RopeConfig | None  # None: no rotary embedding (NoPE)
  heads: int
  kv_heads: int
  head_dim: int
  ffn: str  # 'mlp' or 'moe'
  ffn_width: int  # hidden channels of the MLP, or of one expert
  # SwiGLU's factors are clamped there, those of a shared expert by the second;
  # 0: they are not. See gated_jax/ops/swiglu.py.
  limit: float = 0.0
  shared_limit: float = 0.0
  norm: str = ''  # of NORMS; '': the model's

  @property
  def attends(self) -> bool:
    """False for mixers without heads, windows and rotary embedding."""
    return self.mixer not in OWN_SETTINGS

  def check(self, word: str) -> None:
    """ValueError where sizes do not fit each other, naming the layer's word."""
    where = f' in layer {word!r}'
    choice(f'layer {word!r}: norm', self.norm, ('', *NORMS))
    not_negative(
      **{
        f'layer {word!r}: {name}': getattr(self, name)
        for name in ('window', 'limit', 'shared_limit')
      }
    )
    positive(
      **{
        f'layer {word!r}: {name}': getattr(self, name)
        for name in ('heads', 'kv_heads', 'head_dim', 'ffn_width')
      }
    )
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.heads={self.heads} must be a multiple of '
        f'model.kv_heads={self.kv_heads}{where}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim={self.head_dim} must be even{where}')
    if self.rope is None:
      return
    rotating = int(self.head_dim * self.rope.fraction)
    if self.rope.scaling == 'proportional':  # whole pairs of the whole head
      rotating -= rotating % 2
    if not rotating or rotating % 2:
      raise ValueError(
        f'rope.fraction={self.rope.fraction} of model.head_dim='
        f'{self.head_dim} must be an even number of channels{where}'
      )


# Fields that a word may set, of its mixer and of its feed-forward block.
_MIXER_FIELDS: dict[str, type] = {
  'window': int,
  'nope': bool,
  'heads': int,
  'kv_heads': int,
  'head_dim': int,
  'rope_base': float,
  'rope_fraction': float,
  'rope_scaling': str,
  'norm': str,
}
_FFN_FIELDS: dict[str, type] = {
  'width': int,
  'limit': float,
  'shared_limit': float,
}
# Mixers that take no field and no rotary embedding, and the settings that they
# take instead.
OWN_SETTINGS = {'gated_deltanet': 'model.delta', 'short_conv': 'model.conv'}


def read_word(word: str, model: Any) -> LayerSpec:
  """The layer that a word describes.

  Args:
    word: as the top of this file shows.
    model: the ModelConfig whose sizes hold where the word says nothing.

  Raises:
    ValueError: the word names no layer, in one line with the nearest right
      name.
  """
  first, plus, second = word.partition('+')
  mixer, mixer_fields = _split(word, first, _MIXER_FIELDS)
  ffn, ffn_fields = _split(word, second, _FFN_FIELDS) if plus else ('mlp', {})
  if mixer in OWN_SETTINGS and mixer_fields:
    raise ValueError(
      f'layer {word!r}: {mixer} has the sizes of {OWN_SETTINGS[mixer]}, so '
      f'that {next(iter(mixer_fields))} would do nothing'
    )
  if ffn not in FFNS:
    raise ValueError(
      f'layer {word!r} has no feed-forward block {ffn!r}' + _nearest(ffn, FFNS)
    )
  own_width = model.moe.width if ffn == 'moe' else model.mlp_width
  norm = mixer_fields.get('norm', model.norm)
  if 'shared_limit' in ffn_fields and not (
    ffn == 'moe' and model.moe.shared_width
  ):
    raise ValueError(
      f'layer {word!r} has no shared expert (moe.shared_width=0), so '
      'shared_limit would do nothing'
    )
  return LayerSpec(
    mixer=mixer,
    window=mixer_fields.get('window', 0),
    rope=None
    if mixer in OWN_SETTINGS
    else _rope(word, mixer_fields, model.rope),
    heads=mixer_fields.get('heads', model.heads),
    kv_heads=mixer_fields.get('kv_heads', model.kv_heads),
    head_dim=mixer_fields.get('head_dim', model.head_dim),
    ffn=ffn,
    ffn_width=ffn_fields.get('width', own_width),
    limit=ffn_fields.get('limit', 0.0),
    shared_limit=ffn_fields.get('shared_limit', 0.0),
    norm='' if norm == model.norm else norm,
  )


def word_of(layer: LayerSpec, model: Any) -> str:
  """The shortest word that `read_word` turns into this layer."""
  fields = []
  if layer.attends:
    fields = _mixer_fields(layer, model)
  word = layer.mixer + ':' * bool(fields) + ','.join(fields)
  own_width = model.moe.width if layer.ffn == 'moe' else model.mlp_width
  after = [f'width={layer.ffn_width}'] * (layer.ffn_width != own_width)
  after += [
    f'{name}={getattr(layer, name)}'
    for name in ('limit', 'shared_limit')
    if getattr(layer, name)
  ]
  if layer.ffn == 'mlp' and not after:
    return word
  return f'{word}+{layer.ffn}' + ':' * bool(after) + ','.join(after)


def _mixer_fields(layer: LayerSpec, model: Any) -> list[str]:
  """Fields of a layer's mixer that differ from the model's own."""
  fields = [f'window={layer.window}'] if layer.window else []
  if layer.rope is None:
    fields.append('nope')
  elif layer.rope != model.rope:
    fields += [
      f'rope_{name}={getattr(layer.rope, name)}'
      for name in ('base', 'fraction')
      if getattr(layer.rope, name) != getattr(model.rope, name)
    ]
    if layer.rope.scaling != model.rope.scaling:
      fields.append(f'rope_scaling={layer.rope.scaling}')
  fields += [
    f'{name}={getattr(layer, name)}'
    for name in ('heads', 'kv_heads', 'head_dim')
    if getattr(layer, name) != getattr(model, name)
  ]
  if layer.norm and layer.norm != model.norm:
    fields.append(f'norm={layer.norm}')
  return fields


def shortest_pattern(words: Sequence[str]) -> tuple[str, ...]:
  """The fewest words that repeat to all of these."""
  depth, words = len(words), tuple(words)
  for period in range(1, depth):
    if depth % period == 0 and words[:period] * (depth // period) == words:
      return words[:period]
  return words


def lead_and_pattern(
  words: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The fewest words of a lead and of a pattern after it that make all these.

  The fewer there are, the fewer layers a compiler sees.
  """
  depth, words = len(words), tuple(words)
  choices = []
  for period in range(1, depth + 1):
    lead = depth - period
    while lead and words[lead - 1] == words[lead - 1 + period]:
      lead -= 1
    lead += (depth - lead) % period
    choices.append((lead + period, lead, period))
  _, lead, period = min(choices)
  return words[:lead], words[lead : lead + period]


def _rope(
  word: str, fields: dict[str, Any], rope: RopeConfig
) -> RopeConfig | None:
  """The model's rotary embedding with what the word overrides."""
  changes = {
    name.removeprefix('rope_'): value
    for name, value in fields.items()
    if name.startswith('rope_')
  }
  scaling = changes.pop('scaling', rope.scaling)
  if scaling != rope.scaling:
    if scaling != 'none':
      raise ValueError(
        f'layer {word!r}: rope_scaling={scaling!r} can only be none, which '
        "takes the model's own away"
      )
    rope = RopeConfig(base=rope.base, fraction=rope.fraction)
  if not fields.get('nope'):
    return dataclasses.replace(rope, **changes) if changes else rope
  if changes or 'rope_scaling' in fields:
    raise ValueError(
      f'layer {word!r} has no rotary embedding (nope), so '
      f'rope_{next(iter(changes), "scaling")} would do nothing'
    )
  return None


def _split(
  word: str, part: str, known: dict[str, type]
) -> tuple[str, dict[str, Any]]:
  """The name before the colon, and the fields after it."""
  name, colon, rest = part.partition(':')
  if not name.isidentifier():
    raise ValueError(
      f"layer {word!r} must be written as 'mixer:field=value,...+ffn'"
    )
  fields: dict[str, Any] = {}
  for field in rest.split(',') if colon else ():
    key, equals, text = field.strip().partition('=')
    if key not in known:
      raise ValueError(
        f'layer {word!r}: {name} has no field {key!r}' + _nearest(key, known)
      )
    if key in fields:
      raise ValueError(f'layer {word!r} says {key} twice')
    fields[key] = _value(word, key, text, known[key], bool(equals))
  return name, fields


def _value(word: str, key: str, text: str, kind: type, given: bool) -> Any:
  if kind is bool:
    if given:
      raise ValueError(f'layer {word!r}: {key} takes no value')
    return True
  try:
    return kind(text)
  except ValueError:
    raise ValueError(
      f'layer {word!r}: {key}={text!r} must be of type {kind.__name__}'
    ) from None


def _nearest(name: str, known: Any) -> str:
  near = difflib.get_close_matches(name, sorted(known), n=1)
  return f'; did you mean {near[0]}?' if near else f'; {", ".join(known)} exist'
