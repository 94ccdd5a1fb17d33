"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet to one of attention.

Norms are zero-centred, rotary embedding is partial, and attention keeps its
gate within `q_proj`, each query head's rows beside its gate's. Qwen3-Next joins
the projections of DeltaNet by key head, Qwen3.5 has them apart. Published
Qwen3.5 folders hold a vision tower and an additional head as well, which are
set aside.
"""

from collections.abc import Callable
from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.config import shortest_pattern
from gated_jax.hf.families.family import UNUSED_EXPERTS
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import interval
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import EXPERTS
from gated_jax.hf.families.rows import FUSED_EXPERTS
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PRE_NORM
from gated_jax.hf.families.rows import fused_query
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.families.rows import renamed
from gated_jax.hf.families.rows import shared_expert
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_layer_types
from gated_jax.hf.keys import write_deltanet
from gated_jax.hf.names import Row


def _delta(*names: str) -> tuple[str, ...]:
  """Paths of parameters of a layer of Gated DeltaNet."""
  return tuple(f'gated_deltanet/{name}' for name in names)


_QKV = _delta('query/kernel', 'key/kernel', 'value/kernel')
_FILTERS = _delta('query_filter', 'key_filter', 'value_filter')
_STEP = _delta('beta/kernel', 'decay/kernel')
_GATE = _delta('gate/kernel')
_DELTA = layer_rows(
  Row('input_layernorm.weight', ('gated_deltanet_norm/scale',), inputs=0),
  Row('linear_attn.conv1d.weight', _FILTERS, filter=True),
  Row('linear_attn.A_log', _delta('log_rate'), inputs=0),
  Row('linear_attn.dt_bias', _delta('step_bias'), inputs=0),
  Row('linear_attn.norm.weight', _delta('output_scale'), inputs=0),
  Row('linear_attn.out_proj.weight', _delta('out/kernel'), inputs=2),
)
_JOINED = layer_rows(
  Row(
    'linear_attn.in_proj_qkvz.weight', _QKV + _GATE, groups='delta.key_heads'
  ),
  Row('linear_attn.in_proj_ba.weight', _STEP, groups='delta.key_heads'),
)
_APART = layer_rows(
  Row('linear_attn.in_proj_qkv.weight', _QKV),
  Row('linear_attn.in_proj_z.weight', _GATE),
  Row('linear_attn.in_proj_b.weight', _STEP[:1]),
  Row('linear_attn.in_proj_a.weight', _STEP[1:]),
)
_LAYERS = (
  *COMMON,
  *fused_query('heads'),
  *PRE_NORM,
  *MLP,
  *_DELTA,
  *layer_rows(
    Row('mlp.gate.weight', ('moe/router/kernel',)),
    Row('mlp.shared_expert_gate.weight', ('moe/shared_gate/kernel',)),
  ),
  *shared_expert('mlp.shared_expert'),
)
_INNER = ('model.', 'model.language_model.')


def _read_delta(keys: Keys) -> dict[str, Any]:
  """Sizes of DeltaNet; its gate has another name than attention's."""
  kind = keys.take('output_gate_type', 'silu')
  if kind not in ('silu', 'swish'):
    keys.refuse(
      f' has output_gate_type={kind!r}, and the gate of linear attention is '
      'swish in this family'
    )
  return {
    'key_heads': keys.integer('linear_num_key_heads', 16),
    'value_heads': keys.integer('linear_num_value_heads', 32),
    'key_dim': keys.integer('linear_key_head_dim', 128),
    'value_dim': keys.integer('linear_value_head_dim', 128),
    'filter_width': keys.integer('linear_conv_kernel_dim', 4),
  }


def _read_hybrid(
  keys: Keys, depth: int, sparse: Callable[[int], bool] = lambda _: False
) -> dict[str, Any]:
  """Layers of both kinds; `sparse` tells those with experts by number."""
  every = keys.integer('full_attention_interval', 4)
  keys.expect('attn_output_gate', True)
  keys.expect('use_sliding_window', False)
  default = interval(depth, every, 'linear_attention')
  words = read_layer_types(keys, default, None, linear='gated_deltanet')
  words = [f'{word}+moe' * sparse(i) or word for i, word in enumerate(words)]
  return {
    'pattern': shortest_pattern(words),
    'norm_zero_centered': True,
    'gate': {
      'position': 'sdpa_output',
      'bias': keys.taken['attention_bias'],
    },
    'delta': _read_delta(keys),
  }


def _read_experts(keys: Keys, experts: int, top_k: int) -> dict[str, Any]:
  """Settings of experts, beside a shared one with a gate of its own."""
  shared = keys.integer('shared_expert_intermediate_size', 512, least=0)
  return {
    'experts': experts,
    'top_k': keys.integer('num_experts_per_tok', top_k),
    'width': keys.integer('moe_intermediate_size', 512),
    'shared_width': shared,
    'shared_gate': shared > 0,
    'balance_loss': keys.number('router_aux_loss_coef', 0.001),
  }


def _read_qwen3_next(keys: Keys, depth: int) -> dict[str, Any]:
  experts = keys.integer('num_experts', 512, least=0)
  dense = keys.sequence('mlp_only_layers', int, [])
  step = keys.integer('decoder_sparse_step', 1)

  def sparse(layer: int) -> bool:
    """True for a layer that has experts."""
    return bool(experts) and layer not in dense and (layer + 1) % step == 0

  values = _read_hybrid(keys, depth, sparse)
  if any(map(sparse, range(depth))):
    values['moe'] = _read_experts(keys, experts, 10)
    values['moe']['normalize'] = keys.flag('norm_topk_prob', True)
  return values


def _read_qwen3_5_moe(keys: Keys, depth: int) -> dict[str, Any]:
  values = _read_hybrid(keys, depth, lambda _: True)
  values['moe'] = _read_experts(keys, keys.integer('num_experts', 256), 8)
  return values


def _write_experts(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  return {
    'num_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    'shared_expert_intermediate_size': moe.shared_width,
    'router_aux_loss_coef': moe.balance_loss,
  }


def _write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
  values = write_deltanet(config)
  if not config.has_experts:
    return values | {'num_experts': 0}
  dense = [i for i, layer in enumerate(config.layers) if layer.ffn == 'mlp']
  return (
    values
    | _write_experts(config)
    | {'mlp_only_layers': dense, 'norm_topk_prob': config.moe.normalize}
  )


def _write_qwen3_5_moe(config: ModelConfig) -> dict[str, Any]:
  return write_deltanet(config) | _write_experts(config)


# Keys that change nothing in the classes of transformers.
_UNUSED = frozenset(
  {
    'mamba_ssm_dtype',
    'mlp_only_layers',
    'mtp_num_hidden_layers',
    'mtp_use_dedicated_embeddings',
    'sliding_window',
  }
)
_AROUND = dict.fromkeys(
  (
    'image_token_id',
    'language_model_only',
    'video_token_id',
    'vision_config',
    'vision_end_token_id',
    'vision_start_token_id',
  )
)
_VISION = ('model.visual.*', 'mtp.*')

_DENSE_ROWS = (*_LAYERS, *_APART)
_MOE_ROWS = (*_LAYERS, *_APART, *EXPERTS)
_FUSED_ROWS = (*_LAYERS, *_APART, *FUSED_EXPERTS)

QWEN3_5 = Family(
  name='qwen3_5',
  model_type='qwen3_5_text',
  architecture='Qwen3_5ForCausalLM',
  rows=_DENSE_ROWS,
  read=_read_hybrid,
  write=write_deltanet,
  fraction=0.25,
  inert=_UNUSED,
  aside=('mtp.*',),
  about='Gated DeltaNet, and attention with a gate for each channel; dense',
  limits='`mtp.*` is set aside: it predicts several tokens at once',
)
QWEN3_5_MOE = Family(
  name='qwen3_5_moe',
  model_type='qwen3_5_moe_text',
  architecture='Qwen3_5MoeForCausalLM',
  rows=_MOE_ROWS,
  other_rows=(_FUSED_ROWS,),
  read=_read_qwen3_5_moe,
  write=_write_qwen3_5_moe,
  fraction=0.25,
  inert=_UNUSED,
  aside=('mtp.*',),
  about=(
    'the same with experts in every layer and a shared one with a gate of its'
    ' own'
  ),
  limits='`mtp.*`, as above',
)
QWEN3_NEXT = Family(
  name='qwen3_next',
  model_type='qwen3_next',
  architecture='Qwen3NextForCausalLM',
  rows=(*_LAYERS, *_JOINED, *EXPERTS),
  other_rows=((*_LAYERS, *_JOINED, *FUSED_EXPERTS),),
  read=_read_qwen3_next,
  write=_write_qwen3_next,
  fraction=0.25,
  inert=UNUSED_EXPERTS | _UNUSED,
  aside=('mtp.*',),
  about='Gated DeltaNet and gated attention, experts in all layers or in some',
  limits='`mtp.*`, as above',
)
# The form that Qwen publishes: the language model inside of a larger one.
QWEN3_5_PUBLISHED = Family(
  name='qwen3_5_published',
  model_type='qwen3_5',
  inside='qwen3_5_text',
  architecture='Qwen3_5ForConditionalGeneration',
  rows=renamed(_DENSE_ROWS, *_INNER),
  read=_read_hybrid,
  fraction=0.25,
  inert=_UNUSED,
  around=_AROUND,
  aside=_VISION,
  about='Qwen3.5 and 3.6 as they are published',
  limits=(
    '`model.visual.*` and `mtp.*` are set aside; it is exported as `qwen3_5`,'
    ' without them'
  ),
)
QWEN3_5_MOE_PUBLISHED = Family(
  name='qwen3_5_moe_published',
  model_type='qwen3_5_moe',
  inside='qwen3_5_moe_text',
  architecture='Qwen3_5MoeForConditionalGeneration',
  rows=renamed(_FUSED_ROWS, *_INNER),
  other_rows=(renamed(_MOE_ROWS, *_INNER),),
  read=_read_qwen3_5_moe,
  fraction=0.25,
  inert=_UNUSED,
  around=_AROUND,
  aside=_VISION,
  about='the same with experts, in one tensor or one each',
  limits='as above; it is exported as `qwen3_5_moe`',
)
