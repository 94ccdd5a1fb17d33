"""What each family of models says in its config.json beyond the common words.

A family's `read` turns its own keys into settings and refuses by name what
the decoder cannot compute; `write` is the inverse. The table's order is that
of choice on export. Read `gated_jax/hf/config.py` next.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import shortest_pattern
from gated_jax.hf import names
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_layer_types


@dataclasses.dataclass(frozen=True)
class Family:
  """How a kind of model is named and described elsewhere.

  Attributes:
    name: On our command line.
    model_type, architecture: In config.json.
    rows: Its tensors.
    read: From its own keys and the number of layers, settings of ours.
    write: Its own keys.
    fraction: partial_rotary_factor where config.json has none.
    inert: Keys of its own that change no logits.
    marks: Keys of which one tells it from another of the same architecture.
  """

  name: str
  model_type: str
  architecture: str
  rows: tuple[names.Row, ...]
  read: Callable[[Keys, int], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]
  fraction: float = 1.0
  inert: frozenset[str] = frozenset()
  marks: frozenset[str] = frozenset()


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
  keys.expect('qkv_bias', False)
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
  for kind, gated in flags.items():
    if gated:
      values['gate'] = {'position': 'sdpa_output', 'granularity': kind}
  return values


def _write_gated_qwen3(config: ModelConfig) -> dict[str, Any]:
  kind = config.gate.granularity if config.gate.position != 'none' else ''
  return _write_qwen3(config) | {
    'qkv_bias': False,
    'use_qk_norm': config.qk_norm,
    'elementwise_attn_output_gate': kind == 'elementwise',
    'headwise_attn_output_gate': kind == 'headwise',
  }


def _read_moe(keys: Keys, depth: int) -> dict[str, Any]:
  keys.expect('decoder_sparse_step', 1, 'every layer has experts, or none')
  keys.expect('mlp_only_layers', [], 'every layer has experts, or none')
  sliding = keys.flag('use_sliding_window', False)
  window = keys.integer('sliding_window', 0, least=0)
  sees = f':window={window}' if sliding and window else ''
  # Newer versions of transformers write the second name.
  other = keys.integer('num_local_experts', None)
  return {
    'pattern': (f'attention{sees}+moe',),
    'gate': {'position': 'none'},
    'moe': {
      'experts': keys.integer(
        'num_experts', *([] if other is None else [other])
      ),
      'top_k': keys.integer('num_experts_per_tok'),
      'width': keys.integer('moe_intermediate_size'),
      'normalize': keys.flag('norm_topk_prob', False),
      'balance_loss': keys.number('router_aux_loss_coef', 0.001),
    },
  }


def _write_moe(config: ModelConfig) -> dict[str, Any]:
  return {
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'num_experts': config.moe.experts,
    'num_experts_per_tok': config.moe.top_k,
    'moe_intermediate_size': config.moe.width,
    'norm_topk_prob': config.moe.normalize,
    'router_aux_loss_coef': config.moe.balance_loss,
    'use_sliding_window': bool(config.layers[0].window),
    'sliding_window': config.layers[0].window or None,
  }


def _interval(depth: int, every: int, kind: str) -> list[str]:
  """Every n-th layer attends to all, the others are of a kind."""
  return [
    kind if (layer + 1) % every else 'full_attention' for layer in range(depth)
  ]


def _read_hybrid(keys: Keys, depth: int) -> dict[str, Any]:
  """Qwen3-Next and Qwen3.5, where no layer is linear attention."""
  every = keys.integer('full_attention_interval', 4)
  keys.expect('attn_output_gate', True)
  keys.expect('output_gate_type', 'sigmoid')
  default = _interval(depth, every, 'linear_attention')
  return {
    'pattern': shortest_pattern(read_layer_types(keys, default, None)),
    'norm_zero_centered': True,
    'gate': {'position': 'sdpa_output'},
  }


def _read_qwen3_next(keys: Keys, depth: int) -> dict[str, Any]:
  experts = keys.integer('num_experts', 512, least=0)
  dense = keys.sequence('mlp_only_layers', int, [])
  if experts and set(range(depth)) - set(dense):
    raise ValueError(
      f'{keys.where} has num_experts={experts}, and the decoder has no gate '
      'on the output of a shared expert (shared_expert_gate)'
    )
  return _read_hybrid(keys, depth)


def _write_hybrid(config: ModelConfig) -> dict[str, Any]:
  types = write_layer_types(config)['layer_types']
  return {'layer_types': types, 'full_attention_interval': 1}


def _write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
  return _write_hybrid(config) | {'num_experts': 0}


def _read_afmoe(keys: Keys, depth: int) -> dict[str, Any]:
  dense = min(keys.integer('num_dense_layers', 1, least=0), depth)
  every = keys.integer('global_attn_every_n_layers', 4)
  window = keys.integer('sliding_window', 1024)
  default = _interval(depth, every, 'sliding_attention')
  words = read_layer_types(keys, default, window, 'attention:nope')
  for group in ('n_group', 'topk_group', *_AFMOE_GROUPS):
    keys.expect(group, 1, 'its experts are in one group')
  values: dict[str, Any] = {
    'pattern': shortest_pattern(words),
    'norm': 'sandwich',
    'gate': {'position': 'sdpa_output'},
  }
  if keys.flag('mup_enabled', False):
    values['embed_scale'] = math.sqrt(keys.taken['hidden_size'])
  if dense == depth:
    return values
  width = keys.integer('moe_intermediate_size', 1408)
  return values | {
    'lead': tuple(words[:dense]),
    'pattern': shortest_pattern([f'{word}+moe' for word in words[dense:]]),
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


# Groups of experts, and settings of training, that the class does not read.
_AFMOE_GROUPS = ('num_expert_groups', 'num_limited_groups')
_AFMOE_UNUSED = {'score_func', 'route_norm', 'load_balance_coeff'}
_UNUSED_EXPERTS = {
  'num_experts',
  'num_experts_per_tok',
  'num_shared_experts',
  'moe_intermediate_size',
  'shared_expert_intermediate_size',
  'norm_topk_prob',
  'route_scale',
  'router_aux_loss_coef',
  'decoder_sparse_step',
}
_UNUSED_LINEAR = {
  'linear_conv_kernel_dim',
  'linear_key_head_dim',
  'linear_value_head_dim',
  'linear_num_key_heads',
  'linear_num_value_heads',
  'mamba_ssm_dtype',
}

FAMILIES = (
  Family(
    name='qwen3',
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    rows=names.QWEN3,
    read=_read_qwen3,
    write=_write_qwen3,
  ),
  Family(
    name='qwen3_moe',
    model_type='qwen3_moe',
    architecture='Qwen3MoeForCausalLM',
    rows=names.QWEN3_MOE,
    read=_read_moe,
    write=_write_moe,
    inert=frozenset({'max_window_layers'}),
  ),
  Family(
    name='gated_qwen3',
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    rows=names.GATED_QWEN3,
    read=_read_gated_qwen3,
    write=_write_gated_qwen3,
    marks=frozenset(
      {
        'elementwise_attn_output_gate',
        'headwise_attn_output_gate',
        'use_qk_norm',
      }
    ),
  ),
  Family(
    name='qwen3_5',
    model_type='qwen3_5_text',
    architecture='Qwen3_5ForCausalLM',
    rows=names.QWEN3_NEXT,
    read=_read_hybrid,
    write=_write_hybrid,
    fraction=0.25,
    inert=frozenset(_UNUSED_LINEAR),
  ),
  Family(
    name='qwen3_next',
    model_type='qwen3_next',
    architecture='Qwen3NextForCausalLM',
    rows=names.QWEN3_NEXT,
    read=_read_qwen3_next,
    write=_write_qwen3_next,
    fraction=0.25,
    inert=frozenset(_UNUSED_LINEAR | _UNUSED_EXPERTS),
  ),
  Family(
    name='afmoe',
    model_type='afmoe',
    architecture='AfmoeForCausalLM',
    rows=names.AFMOE,
    read=_read_afmoe,
    write=_write_afmoe,
    inert=frozenset(_UNUSED_EXPERTS | _AFMOE_UNUSED),
  ),
)
