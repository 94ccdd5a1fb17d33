"""AFMoE (Trinity): windows with and global layers without rotary embedding.

Norms on both sides of each block, a separate gate, and experts chosen by
sigmoid scores and a bias.
"""

import math
from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import lead_and_pattern
from gated_jax.hf.families.family import UNUSED_EXPERTS
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import interval
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import SANDWICH_NORM
from gated_jax.hf.families.rows import SEPARATE_GATE
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.families.rows import shared_expert
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_layer_types
from gated_jax.hf.names import Row

_ROWS = (
  *COMMON,
  *PLAIN_QUERY,
  *SEPARATE_GATE,
  *SANDWICH_NORM,
  *MLP,
  *layer_rows(
    Row('mlp.router.gate.weight', ('moe/router/kernel',)),
    Row('mlp.expert_bias', ('moe/router/bias',), inputs=0),
  ),
  *shared_expert('mlp.shared_experts'),
  *EXPERTS,
)
# Groups of experts, and settings of training, that the class does not read.
_AFMOE_GROUPS = ('num_expert_groups', 'num_limited_groups')
_AFMOE_UNUSED = {'score_func', 'route_norm', 'load_balance_coeff'}


def _read_afmoe(keys: Keys, depth: int) -> dict[str, Any]:
  dense = min(keys.integer('num_dense_layers', 1, least=0), depth)
  every = keys.integer('global_attn_every_n_layers', 4)
  window = keys.integer('sliding_window', 1024)
  default = interval(depth, every, 'sliding_attention')
  words = read_layer_types(keys, default, window, 'attention:nope')
  for group in ('n_group', 'topk_group', *_AFMOE_GROUPS):
    keys.expect(group, 1, 'its experts are in one group')
  sparse = [word + '+moe' * (i >= dense) for i, word in enumerate(words)]
  lead, pattern = lead_and_pattern(sparse)
  values: dict[str, Any] = {
    'lead': lead,
    'pattern': pattern,
    'norm': 'sandwich',
    'gate': {'position': 'sdpa_output'},
  }
  if keys.flag('mup_enabled', False):
    values['embed_scale'] = math.sqrt(keys.taken['hidden_size'])
  if dense == depth:
    return values
  width = keys.integer('moe_intermediate_size', 1408)
  return values | {
    'moe': {
      'experts': keys.integer('num_experts', 64),
      'top_k': keys.integer('num_experts_per_tok', 6),
      'width': width,
      'shared_width': width * keys.integer('num_shared_experts', 2, least=0),
      'score': 'sigmoid',
      'bias': True,
      'scale': keys.number('route_scale', 1.0),
    },
  }


def _write_afmoe(config: ModelConfig) -> dict[str, Any]:
  dense = [layer.ffn for layer in config.layers].count('mlp')
  values = write_layer_types(config) | {
    'num_dense_layers': dense,
    'mup_enabled': config.embed_scale != 1,
  }
  if not config.has_experts:
    return values
  moe = config.moe
  return values | {
    'num_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    'num_shared_experts': moe.shared_width // moe.width,
    'route_scale': moe.scale,
  }


AFMOE = Family(
  name='afmoe',
  model_type='afmoe',
  architecture='AfmoeForCausalLM',
  rows=_ROWS,
  read=_read_afmoe,
  write=_write_afmoe,
  inert=UNUSED_EXPERTS | _AFMOE_UNUSED,
  about=(
    'Trinity: windows with and global layers without rotary embedding, norms '
    'on both sides, dense layers first and then experts, muP embeddings'
  ),
  limits=(
    'more than one group of experts is refused, which its class does not have'
  ),
)
