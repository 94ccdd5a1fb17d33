"""Qwen3-Next and Qwen3.5: zero-centred norms, partial rotary embedding.

They keep the gate within `q_proj`, each query head's rows beside its gate's.
"""

from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import shortest_pattern
from gated_jax.hf.families.family import UNUSED_EXPERTS
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import interval
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import FUSED_QUERY
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PRE_NORM
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_layer_types

_ROWS = (
  *COMMON,
  *layer_rows(FUSED_QUERY._replace(groups='heads')),
  *PRE_NORM,
  *MLP,
)
# Keys of linear attention, where a model has none.
_UNUSED_LINEAR = {
  'linear_conv_kernel_dim',
  'linear_key_head_dim',
  'linear_value_head_dim',
  'linear_num_key_heads',
  'linear_num_value_heads',
  'mamba_ssm_dtype',
}


def _read_hybrid(keys: Keys, depth: int) -> dict[str, Any]:
  """Qwen3-Next and Qwen3.5, where no layer is linear attention."""
  every = keys.integer('full_attention_interval', 4)
  keys.expect('attn_output_gate', True)
  keys.expect('output_gate_type', 'sigmoid')
  default = interval(depth, every, 'linear_attention')
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


QWEN3_5 = Family(
  name='qwen3_5',
  model_type='qwen3_5_text',
  architecture='Qwen3_5ForCausalLM',
  rows=_ROWS,
  read=_read_hybrid,
  write=_write_hybrid,
  fraction=0.25,
  inert=frozenset(_UNUSED_LINEAR),
)
QWEN3_NEXT = Family(
  name='qwen3_next',
  model_type='qwen3_next',
  architecture='Qwen3NextForCausalLM',
  rows=_ROWS,
  read=_read_qwen3_next,
  write=_write_qwen3_next,
  fraction=0.25,
  inert=UNUSED_EXPERTS | _UNUSED_LINEAR,
)
