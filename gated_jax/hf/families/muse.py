"""Muse Glimmer: centred norms on both sides of each block, muP, capped logits.

The embedding and the heads of queries and keys have norms without a scale. The
last layers of groups of four see all tokens and have no rotary embedding, which
two lists say apart from one another. `muse_spark.py` has more of its kind.
"""

from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import shortest_pattern
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import FEEDFORWARD_NORM
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import SEPARATE_GATE
from gated_jax.hf.families.rows import renamed
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_layer_types

_ROWS = renamed(
  (
    *COMMON,
    *PLAIN_QUERY,
    *SEPARATE_GATE,
    *FEEDFORWARD_NORM,
    *MLP,
  ),
  'model.',
  'model.language_model.',
)
# The smallest tower that the class builds: an export has none, and the class
# cannot be made without one.
NO_VISION = {
  'hidden_size': 16,
  'intermediate_size': 16,
  'num_attention_heads': 2,
  'num_hidden_layers': 1,
  'patch_size': 2,
  'patch_temporal': 1,
  'pos_emb_height': 4,
  'pos_emb_width': 4,
  'max_position_embeddings': 16,
}


# What stands around the language model, but for the type of the tower.
AROUND = {
  'out_hidden_size': 64,
  'projector_hidden_size': 16,
  'projector_hidden_act': 'gelu',
  'image_token_id': 200092,
  'video_token_id': 200091,
}
ASIDE = (
  'model.vision_tower.*',
  'model.vision_adapter.*',
  'model.vision_projection.*',
)


def read_words(keys: Keys, depth: int) -> list[str]:
  """The word of every layer, from its type and its rotary base."""
  last = [(depth - 1 - layer) % 4 == 0 for layer in range(depth)]
  default = ['full_attention' if x else 'sliding_attention' for x in last]
  words = read_layer_types(keys, default, keys.integer('sliding_window', 2048))
  bases = keys.numbers('layer_rope_theta', [0.0 if x else 1.0 for x in last])
  if len(bases) != depth:
    raise ValueError(
      f'{keys.where} has {len(bases)} layer_rope_theta for '
      f'num_hidden_layers={depth}'
    )
  # The class reads of a base only whether it is zero.
  return [
    word if base else word + (',nope' if ':' in word else ':nope')
    for word, base in zip(words, bases, strict=True)
  ]


def read_scales(
  keys: Keys, query_scale: float, output_scale: float
) -> dict[str, Any]:
  """Settings of norms, factors and the gate; the class's factors if absent."""
  return {
    'norm': 'sandwich',
    'norm_zero_centered': True,
    'final_norm_plain': True,
    'post_norm_eps': keys.number('post_norm_eps', 1e-8),
    'qk_norm_scale': False,
    'query_scale': keys.number('qk_scale_factor', query_scale),
    'embed_norm': True,
    'output_scale': keys.number('output_multiplier', output_scale),
    'logit_softcap': keys.number('final_logit_softcapping', 20.0),
    'gate': {'position': 'sdpa_output'},
  }


def write_words_and_scales(config: ModelConfig) -> dict[str, Any]:
  """The inverse of both."""
  return write_layer_types(config) | {
    'layer_rope_theta': [
      0.0 if layer.rope is None else config.rope.base for layer in config.layers
    ],
    'post_norm_eps': config.post_norm_eps,
    'qk_scale_factor': config.query_scale,
    'output_multiplier': config.output_scale,
    'final_logit_softcapping': config.logit_softcap,
  }


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  keys.expect('hidden_activation', 'silu')
  words = read_words(keys, depth)
  scales = read_scales(keys, 3.87, 0.19611613513818404)
  return {'pattern': shortest_pattern(words), **scales}


def _write(config: ModelConfig) -> dict[str, Any]:
  return write_words_and_scales(config) | {'hidden_activation': 'silu'}


MUSE_GLIMMER = Family(
  name='muse_glimmer',
  model_type='muse_glimmer',
  architecture='MuseGlimmerForConditionalGeneration',
  rows=_ROWS,
  read=_read,
  write=_write,
  inside='muse_glimmer_text',
  around={
    'vision_config': {'model_type': 'muse_glimmer_vision', **NO_VISION},
    **AROUND,
  },
  aside=ASIDE,
  about=(
    'norms on both sides, norms without a scale on embeddings and heads, muP,'
    ' capped logits'
  ),
  limits=(
    'the vision tower, its adapter and projection are set aside; an export '
    'has none, and its config.json the smallest that the class builds'
  ),
)
