"""Muse Spark: Muse Glimmer with gates on the residual stream, and experts.

Experts read and write fewer channels than the stream has, and each one's output
is normed before it is weighed. Norms without a scale stand on heads' outputs,
before the gate, and behind attention; the one behind the experts scales first.
"""

from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import lead_and_pattern
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.muse import AROUND
from gated_jax.hf.families.muse import ASIDE
from gated_jax.hf.families.muse import NO_VISION
from gated_jax.hf.families.muse import read_scales
from gated_jax.hf.families.muse import read_words
from gated_jax.hf.families.muse import write_words_and_scales
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import FEEDFORWARD_NORM
from gated_jax.hf.families.rows import FUSED_EXPERTS
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import SEPARATE_GATE
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.families.rows import renamed
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_types
from gated_jax.hf.names import Row

_ALL_BUT_EXPERTS = (
  *COMMON,
  *PLAIN_QUERY,
  *SEPARATE_GATE,
  *FEEDFORWARD_NORM,
  *MLP,
  *layer_rows(
    Row(
      'post_attention_residual_gate.gate',
      ('attention_shares/logits',),
      inputs=0,
    ),
    Row(
      'post_feedforward_residual_gate.gate', ('mlp_shares/logits',), inputs=0
    ),
    Row('mlp.gate.weight', ('moe/router/kernel',)),
    Row('mlp.gate.e_score_correction_bias', ('moe/router/bias',), inputs=0),
    Row('mlp.pre_expert_proj.weight', ('moe/reduce/kernel',)),
    Row('mlp.pre_expert_norm.weight', ('moe/input_norm/scale',), inputs=0),
    Row('mlp.post_expert_proj.weight', ('moe/expand/kernel',)),
    Row(
      'mlp.experts.post_expert_norm.weight',
      ('moe/output_norm/scale',),
      inputs=0,
    ),
  ),
)
_FUSED, _EACH = (
  renamed((*_ALL_BUT_EXPERTS, *rows), 'model.', 'model.language_model.')
  for rows in (FUSED_EXPERTS, EXPERTS)
)
_FFN = {'sparse': '+moe', 'dense': ''}
# The smallest tower for sounds that the class builds; it gives rows as wide as
# the language model's.
_NO_AUDIO = {
  'model_type': 'muse_spark_audio',
  'patch_sizes': [2],
  'hidden_sizes': [8],
  'depths': [1],
  'num_hidden_layers': 1,
}


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  if keys.taken['tie_word_embeddings']:
    keys.refuse(
      ' has tie_word_embeddings=True, and MuseSparkForConditionalGeneration '
      'has a matrix of its own for the logits'
    )
  words = read_words(keys, depth)
  ffns = read_types(keys, 'mlp_layer_types', ['sparse'] * depth, _FFN)
  words = [word + _FFN[ffn] for word, ffn in zip(words, ffns, strict=True)]
  lead, pattern = lead_and_pattern(words)
  scales = read_scales(keys, 5.4730064863875, 0.1767766952966369)
  moe = {
    'experts': keys.integer('num_experts', 256),
    'top_k': keys.integer('num_experts_per_tok', 8),
    'width': keys.integer('moe_intermediate_size', 4096),
    'reduced_width': keys.integer('moe_hidden_size', 4096),
    'output_norm': True,
    'score': 'sigmoid',
    'bias': True,
    'logit_scale': scales['output_scale'],
    'router_dtype': 'float32',  # as the class keeps it beside bfloat16
    'scale': keys.number('routed_scaling_factor', 1.0),
  }
  temperature = keys.number('residual_gate_temperature', 0.3)
  return {
    **scales,
    'lead': lead,
    'pattern': pattern,
    'head_norm': True,
    'mixer_post_scale': 'none',
    'ffn_post_scale': 'before',
    'residual': 'gated',
    'residual_temperature': temperature,
    **({'moe': moe} if 'sparse' in ffns else {}),
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  return write_words_and_scales(config) | {
    'mlp_layer_types': [
      'sparse' if layer.ffn == 'moe' else 'dense' for layer in config.layers
    ],
    'num_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    # Which a model has where it has experts; reading back compares.
    'moe_hidden_size': moe.reduced_width or config.width,
    'routed_scaling_factor': moe.scale,
    'residual_gate_temperature': config.residual_temperature,
  }


MUSE_SPARK = Family(
  name='muse_spark',
  model_type='muse_spark',
  architecture='MuseSparkForConditionalGeneration',
  rows=_FUSED,
  other_rows=(_EACH,),
  read=_read,
  write=_write,
  theta=5e5,
  inside='muse_spark_text',
  around={
    'vision_config': {'model_type': 'muse_spark_vision', **NO_VISION},
    'audio_config': lambda config: {
      **_NO_AUDIO,
      'out_hidden_size': config.width,
    },
    'audio_token_id': 200038,
    **AROUND,
  },
  aside=(*ASIDE, 'model.audio_tower.*'),
  spelled={'num_experts': 'num_local_experts'},
  about=(
    'Muse Glimmer with gates on the residual stream, norms of heads before '
    'their gate, and experts of a width of their own, each one normed'
  ),
  limits=(
    'the towers for images and sounds, their adapter and projection are set '
    'aside; an export has none, and its config.json the smallest that the '
    'class builds'
  ),
)
