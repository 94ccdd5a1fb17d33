"""Beam: a residual stream scaled by depth, a gate with one bias for each head.

Norms stand on both sides of each block. Windows have rotary embedding; global
layers have none, and queries that grow with their position. After the first
layers sigmoid scores choose experts by group.
"""

from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import experts_by_scores
from gated_jax.hf.families.family import in_words
from gated_jax.hf.families.family import interval
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import FEEDFORWARD_NORM
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import SEPARATE_GATE
from gated_jax.hf.families.rows import layer_rows
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
  *SEPARATE_GATE,
  *FEEDFORWARD_NORM,
  *MLP,
  *layer_rows(
    Row('self_attn.gate_bias', ('attention/gate/bias',), inputs=0),
    Row('mlp.gate.weight', ('moe/router/kernel',)),
    Row('mlp.gate.e_score_correction_bias', ('moe/router/bias',), inputs=0),
  ),
  *EXPERTS,
)
# Of each type of layer; null: it has no rotary embedding.
_ROPES: dict[str, Any] = {
  'full_attention': None,
  'sliding_attention': {'rope_theta': 1e4},
}
_FFN = {'dense': 'mlp', 'sparse': 'moe'}
# Constants of the class.
_GROWTH = {'query_growth': 0.1, 'query_growth_length': 2048}


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  taken = keys.taken
  default = [*interval(depth, 6, 'sliding_attention')[:-1], 'full_attention']
  types = read_types(keys, 'layer_types', default, _ROPES)
  first = min(3, depth)
  ffns = ['dense'] * first + ['sparse'] * (depth - first)
  ffns = read_types(keys, 'mlp_layer_types', ffns, _FFN)
  window = keys.integer('sliding_window', 512)
  ropes = read_ropes(keys, taken['max_position_embeddings'], types, _ROPES)
  moe = experts_by_scores(
    keys,
    groups=keys.integer('n_group', 8),
    top_groups=keys.integer('topk_group', 4),
    scale=keys.number('routed_scaling_factor', 2.5),
    normalize=keys.flag('norm_topk_prob', True),
  )
  layers = [
    LayerSpec(
      mixer='attention',
      window=window if kind == 'sliding_attention' else 0,
      rope=ropes[kind],
      heads=taken['num_attention_heads'],
      kv_heads=taken['num_key_value_heads'],
      head_dim=taken['head_dim'],
      ffn=_FFN[ffn],
      ffn_width=taken['intermediate_size'] if ffn == 'dense' else moe['width'],
    )
    for kind, ffn in zip(types, ffns, strict=True)
  ]
  # Absent means the class's default, and null that there is none.
  absent = 'final_logit_softcapping' not in keys.rest()
  cap = keys.number('final_logit_softcapping', 30.0 if absent else 0.0)
  grows = any(rope is None for rope in ropes.values())
  return in_words(keys, layers, widest(ropes.values()), moe) | {
    'norm': 'sandwich',
    'residual': 'depth_scaled',
    'logit_softcap': cap,
    'gate': {'position': 'sdpa_output', 'bias': True, 'bias_by_head': True},
    **(_GROWTH if grows else {}),
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, types = config.moe, write_layer_types(config)
  return {
    **types,
    # The class makes masks of windows even where no layer has one.
    'sliding_window': types['sliding_window'] or config.length,
    **write_ropes(config.layers),
    'mlp_layer_types': [
      'sparse' if layer.ffn == 'moe' else 'dense' for layer in config.layers
    ],
    'num_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    'n_group': moe.groups,
    'topk_group': moe.top_groups,
    'routed_scaling_factor': moe.scale,
    'norm_topk_prob': moe.normalize,
    'final_logit_softcapping': config.logit_softcap or None,
  }


BEAM = Family(
  name='beam',
  model_type='beam',
  architecture='BeamForCausalLM',
  rows=_ROWS,
  read=_read,
  write=_write,
  rope_by_type=True,
  about=(
    'a residual stream scaled by depth, a gate with a bias for each head, '
    'windows with and global layers without rotary embedding, whose queries '
    'grow, experts in groups, capped logits'
  ),
)
