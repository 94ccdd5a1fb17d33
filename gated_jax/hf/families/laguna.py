"""Laguna: a softplus gate for each head, and a number of heads for each layer.

Types of layers have rotary embeddings of their own; after the first layers,
sigmoid scores choose experts beside a shared one.
"""

from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import experts_by_scores
from gated_jax.hf.families.family import in_words
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import PRE_NORM
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.families.rows import shared_expert
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_types
from gated_jax.hf.keys import write_layer_types
from gated_jax.hf.names import Row
from gated_jax.hf.rope import read_ropes
from gated_jax.hf.rope import widest
from gated_jax.hf.rope import write_ropes

_ROWS = (
  *COMMON,
  *PLAIN_QUERY,
  *PRE_NORM,
  *MLP,
  *layer_rows(
    Row('self_attn.g_proj.weight', ('attention/gate/kernel',)),
    Row('mlp.gate.weight', ('moe/router/kernel',)),
    Row('mlp.experts.e_score_correction_bias', ('moe/router/bias',), inputs=0),
  ),
  *shared_expert('mlp.shared_expert'),
  *EXPERTS,
)
_ROPES = {
  'full_attention': {'rope_theta': 5e5, 'partial_rotary_factor': 0.5},
  'sliding_attention': {'rope_theta': 1e4},
}
_FFN = {'dense': 'mlp', 'sparse': 'moe'}


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  taken = keys.taken
  keys.expect('moe_apply_router_weight_on_input', False)
  types = read_types(keys, 'layer_types', ['full_attention'] * depth, _ROPES)
  ffns = ['dense', *['sparse'] * (depth - 1)]
  ffns = read_types(keys, 'mlp_layer_types', ffns, _FFN)
  heads = keys.sequence(
    'num_attention_heads_per_layer',
    int,
    [taken['num_attention_heads']] * depth,
  )
  if len(heads) != depth:
    raise ValueError(
      f'{keys.where} has {len(heads)} num_attention_heads_per_layer for '
      f'num_hidden_layers={depth}'
    )
  window = keys.integer('sliding_window', 512)
  length = taken['max_position_embeddings']
  ropes = read_ropes(keys, length, types, _ROPES)
  moe = experts_by_scores(
    keys,
    scale=keys.number('moe_routed_scaling_factor', 1.0),
    softcap=keys.number('moe_router_logit_softcapping', 0.0),
    shared_width=keys.integer('shared_expert_intermediate_size'),
  )
  layers = [
    LayerSpec(
      mixer='attention',
      window=window if kind == 'sliding_attention' else 0,
      rope=ropes[kind],
      heads=count,
      kv_heads=taken['num_key_value_heads'],
      head_dim=taken['head_dim'],
      ffn=_FFN[ffn],
      ffn_width=taken['intermediate_size' if ffn == 'dense' else _WIDTH],
    )
    for kind, ffn, count in zip(types, ffns, heads, strict=True)
  ]
  by_head = keys.take('gating', True) in (True, 'per-head')
  return in_words(keys, layers, widest(ropes.values()), moe) | {
    'gate': {
      'position': 'sdpa_output',
      'granularity': 'headwise' if by_head else 'elementwise',
      'activation': 'softplus',
    },
  }


_WIDTH = 'moe_intermediate_size'


def _write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  by_head = config.gate.granularity == 'headwise'
  types = write_layer_types(config)
  if types['sliding_window'] is None:
    del types['sliding_window']  # the class takes no null
  return {
    **types,
    **write_ropes(config.layers),
    'mlp_layer_types': [
      'sparse' if layer.ffn == 'moe' else 'dense' for layer in config.layers
    ],
    'num_attention_heads_per_layer': [layer.heads for layer in config.layers],
    'gating': 'per-head' if by_head else 'per-element',
    'num_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    'shared_expert_intermediate_size': moe.shared_width,
    'moe_routed_scaling_factor': moe.scale,
    'moe_router_logit_softcapping': moe.softcap,
  }


LAGUNA = Family(
  name='laguna',
  model_type='laguna',
  architecture='LagunaForCausalLM',
  rows=_ROWS,
  read=_read,
  write=_write,
  inert=frozenset({'moe_router_score_func', 'qkv_bias'}),
  rope_by_type=True,
  modules=(('.mlp.shared_expert.', '.mlp.shared_experts.'),),
  about=(
    'a softplus gate for each head or channel, heads and rotary embeddings by'
    ' layer, experts'
  ),
  limits='`moe_apply_router_weight_on_input` is refused, as by its class',
)
