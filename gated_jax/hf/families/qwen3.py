"""Qwen3 dense and with experts, and the gated models of the paper's authors.

The authors keep the gate within `q_proj`, whose rows are grouped by kv head:
the queries of a group, then their gates.
"""

from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import lead_and_pattern
from gated_jax.config import shortest_pattern
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import PRE_NORM
from gated_jax.hf.families.rows import fused_query
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_layer_types
from gated_jax.hf.names import Row

_DENSE = (*COMMON, *PLAIN_QUERY, *PRE_NORM, *MLP)
_SPARSE = (
  *COMMON,
  *PLAIN_QUERY,
  *PRE_NORM,
  *MLP,
  *layer_rows(Row('mlp.gate.weight', ('moe/router/kernel',))),
  *EXPERTS,
)
_GATED = (
  *COMMON,
  *fused_query('kv_heads'),
  *PRE_NORM,
  *MLP,
)


def _read_qwen3(keys: Keys, depth: int) -> dict[str, Any]:
  sliding = keys.flag('use_sliding_window', False)
  window = keys.integer('sliding_window', None, least=0)
  first = keys.integer('max_window_layers', depth, least=0)
  if not sliding:
    window, first = None, depth
  default = [
    'full_attention' if layer < first else 'sliding_attention'
    for layer in range(depth)
  ]
  return {
    'pattern': shortest_pattern(read_layer_types(keys, default, window)),
    'gate': {'position': 'none'},
  }


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
  windows = [layer.window for layer in config.layers]
  return write_layer_types(config) | {
    'use_sliding_window': any(windows),
    'max_window_layers': windows.count(0),
  }


def _read_gated_qwen3(keys: Keys, depth: int) -> dict[str, Any]:
  flags = {
    kind: keys.flag(f'{kind}_attn_output_gate', False)
    for kind in ('elementwise', 'headwise')
  }
  if all(flags.values()):
    raise ValueError(
      f'{keys.where} has both elementwise_attn_output_gate and '
      'headwise_attn_output_gate'
    )
  values = _read_qwen3(keys, depth)
  values['qk_norm'] = keys.flag('use_qk_norm', True)
  # Their code reads this key, their class of settings has the other one.
  biases = keys.flag('qkv_bias', keys.taken['attention_bias'])
  values |= {'qkv_bias': biases, 'out_bias': biases}
  for kind, gated in flags.items():
    if gated:
      values['gate'] = {
        'position': 'sdpa_output',
        'granularity': kind,
        'bias': biases,
      }
  return values


def _write_gated_qwen3(config: ModelConfig) -> dict[str, Any]:
  kind = config.gate.granularity if config.gate.position != 'none' else ''
  return _write_qwen3(config) | {
    'qkv_bias': config.qkv_bias,
    'use_qk_norm': config.qk_norm,
    'elementwise_attn_output_gate': kind == 'elementwise',
    'headwise_attn_output_gate': kind == 'headwise',
  }


def _read_moe(keys: Keys, depth: int) -> dict[str, Any]:
  every = keys.integer('decoder_sparse_step', 1)
  dense = set(keys.sequence('mlp_only_layers', int, []))
  sliding = keys.flag('use_sliding_window', False)
  window = keys.integer('sliding_window', 0, least=0)
  word = f'attention:window={window}' if sliding and window else 'attention'
  sparse = [
    layer not in dense and (layer + 1) % every == 0 for layer in range(depth)
  ]
  words = [f'{word}+moe' if experts else word for experts in sparse]
  lead, pattern = lead_and_pattern(words)
  # Newer versions of transformers write the second name.
  other = keys.integer('num_local_experts', None)
  moe = {
    'experts': keys.integer('num_experts', *([] if other is None else [other])),
    'top_k': keys.integer('num_experts_per_tok'),
    'width': keys.integer('moe_intermediate_size'),
    'normalize': keys.flag('norm_topk_prob', False),
    'balance_loss': keys.number('router_aux_loss_coef', 0.001),
  }
  return {
    'lead': lead,
    'pattern': pattern,
    'gate': {'position': 'none'},
    **({'moe': moe} if any(sparse) else {}),
  }


def _write_moe(config: ModelConfig) -> dict[str, Any]:
  return {
    'decoder_sparse_step': 1,
    'mlp_only_layers': [
      number for number, layer in enumerate(config.layers) if layer.ffn == 'mlp'
    ],
    'num_experts': config.moe.experts,
    'num_experts_per_tok': config.moe.top_k,
    'moe_intermediate_size': config.moe.width,
    'norm_topk_prob': config.moe.normalize,
    'router_aux_loss_coef': config.moe.balance_loss,
    'use_sliding_window': bool(config.layers[0].window),
    'sliding_window': config.layers[0].window or None,
  }


QWEN3 = Family(
  name='qwen3',
  model_type='qwen3',
  architecture='Qwen3ForCausalLM',
  rows=_DENSE,
  read=_read_qwen3,
  write=_write_qwen3,
  about='dense and ungated, with sliding windows and biases',
)
QWEN3_MOE = Family(
  name='qwen3_moe',
  model_type='qwen3_moe',
  architecture='Qwen3MoeForCausalLM',
  rows=_SPARSE,
  read=_read_moe,
  write=_write_moe,
  about='ungated, experts in all layers or in some',
)
GATED_QWEN3 = Family(
  name='gated_qwen3',
  model_type='qwen3',
  architecture='Qwen3ForCausalLM',
  rows=_GATED,
  read=_read_gated_qwen3,
  write=_write_gated_qwen3,
  marks=frozenset(
    {
      'elementwise_attn_output_gate',
      'headwise_attn_output_gate',
      'use_qk_norm',
    }
  ),
  about=(
    'the models of the gated attention paper: a gate for each channel or '
    'head, or none'
  ),
  limits=(
    'transformers has no class for them; there they need the code of their '
    'authors'
  ),
)
