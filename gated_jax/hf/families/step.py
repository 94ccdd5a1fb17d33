"""Step 3.5 and 3.7: a sigmoid gate for each head, more heads where windows are.

Centred norms, rotary embeddings by type of layer, sigmoid scores that choose
experts, and SwiGLU clamped in some layers. The files of its makers spell the
settings otherwise than those that transformers writes; both are read, and the
second are written.
"""

import math
from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import experts_by_scores
from gated_jax.hf.families.family import in_words
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import MLP
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import PRE_NORM
from gated_jax.hf.families.rows import SWIGLU
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
    Row('moe.gate.weight', ('moe/router/kernel',)),
    Row('moe.router_bias', ('moe/router/bias',), inputs=0),
    *(
      Row(f'moe.{theirs}.weight', (f'moe/{ours}',), stack=1)
      for theirs, ours in SWIGLU
    ),
  ),
  *shared_expert('share_expert'),
)
_TYPES = ('full_attention', 'sliding_attention')
_FFN = {'dense': 'mlp', 'sparse': 'moe'}


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  taken = keys.taken
  keys.expect('mlp_bias', False)
  beyond = keys.integer('num_nextn_predict_layers', 0, least=0)
  cut = _Lists(keys, depth, beyond)
  types = read_types(
    keys, 'layer_types', ['full_attention'] * depth, _TYPES, beyond
  )
  ffns = read_types(keys, 'mlp_layer_types', cut.ffns(), _FFN, beyond)
  routed, shared = (
    cut.numbers(key, [0.0] * depth)
    for key in ('swiglu_limits', 'swiglu_limits_shared')
  )
  heads = _heads(keys, types)
  ropes = _ropes(keys, types, cut)
  window = keys.integer('sliding_window', 0)
  moe = experts_by_scores(
    keys,
    scale=keys.number('moe_router_scaling_factor', 1.0),
    shared_width=keys.integer('share_expert_dim'),
  )
  layers = [
    LayerSpec(
      mixer='attention',
      window=window if types[i] == 'sliding_attention' else 0,
      rope=ropes[types[i]],
      heads=heads[i],
      kv_heads=taken['num_key_value_heads'],
      head_dim=taken['head_dim'],
      ffn=_FFN[ffns[i]],
      ffn_width=moe['width'] if ffns[i] == 'sparse' else taken[_WIDTH],
      limit=routed[i] if ffns[i] == 'sparse' else shared[i],
      shared_limit=shared[i] if ffns[i] == 'sparse' else 0.0,
    )
    for i in range(depth)
  ]
  scalar = keys.number('query_pre_attn_scalar', float(taken['head_dim']))
  if scalar <= 0:
    raise ValueError(
      f'{keys.where} has query_pre_attn_scalar={scalar}, which is not positive'
    )
  return in_words(keys, layers, widest(ropes.values()), moe) | {
    'norm_zero_centered': True,
    'query_scale': math.sqrt(taken['head_dim'] / scalar),
    'gate': {'position': 'sdpa_output', 'granularity': 'headwise'},
  }


_WIDTH = 'intermediate_size'


class _Lists:
  """Lists with an entry for each layer, and more for layers after the last.

  Those predict several tokens at once, and no logits of the next depend on
  them.
  """

  def __init__(self, keys: Keys, depth: int, beyond: int):
    self.keys, self.depth, self.beyond = keys, depth, beyond

  def numbers(self, key: str, default: list[float]) -> list[float]:
    """Numbers of the layers alone; null is zero."""
    values = self.keys.numbers(key, default)
    if len(values) not in (self.depth, self.depth + self.beyond):
      raise ValueError(
        f'{self.keys.where} has {len(values)} {key} for '
        f'num_hidden_layers={self.depth}'
      )
    return values[: self.depth]

  def ffns(self) -> list[str]:
    """The older list: which layers have experts; from the fourth on."""
    listed = self.keys.take('moe_layers_enum', list(range(3, self.depth)))
    try:
      parts = listed.split(',') if isinstance(listed, str) else listed
      sparse = {int(part) for part in parts if str(part).strip()}
    except (TypeError, ValueError):
      raise ValueError(
        f'{self.keys.where} has moe_layers_enum={listed!r}, which is no list '
        'of layers'
      ) from None
    return ['sparse' if i in sparse else 'dense' for i in range(self.depth)]


def _heads(keys: Keys, types: list[str]) -> list[int]:
  """Query heads of every layer."""
  full = keys.taken['num_attention_heads']
  older = keys.inner('attention_other_setting')
  sliding = keys.integer(
    'num_sliding_attention_heads', older.integer('num_attention_heads', full)
  )
  by_layer = keys.inner('per_layer_config')
  heads = []
  for layer, kind in enumerate(types):
    count = sliding if kind == 'sliding_attention' else full
    own = by_layer.inner(str(layer))
    heads.append(own.integer('num_attention_heads', count))
  return heads


def _ropes(
  keys: Keys, types: list[str], cut: _Lists
) -> dict[str, RopeConfig | None]:
  """The rotary embedding of each type of layer, in either spelling."""
  if isinstance(keys.peek('rope_theta'), list):
    bases = cut.numbers('rope_theta', [])
  else:
    bases = [keys.number('rope_theta', RopeConfig().base)] * len(types)
  fractions = cut.numbers('partial_rotary_factors', [1.0] * len(types))
  scaling = keys.inner('rope_scaling').rest()
  older = {
    kind: {
      'rope_theta': bases[types.index(kind)],
      'partial_rotary_factor': fractions[types.index(kind)],
      **(scaling if kind == 'full_attention' else {}),
    }
    for kind in dict.fromkeys(types)
  }
  return read_ropes(keys, keys.taken['max_position_embeddings'], types, older)


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, layers = config.moe, config.layers
  full = [layer.heads for layer in layers if not layer.window]
  sliding = [layer.heads for layer in layers if layer.window]
  heads = (full or sliding)[0]
  sparse = [layer.ffn == 'moe' for layer in layers]
  types = write_layer_types(config)
  return {
    **types,
    # The class makes masks of windows even where no layer has one.
    'sliding_window': types['sliding_window'] or config.length,
    **write_ropes(layers),
    'num_attention_heads': heads,
    'num_sliding_attention_heads': (sliding or full)[0],
    'per_layer_config': {
      str(i): {'num_attention_heads': layer.heads}
      for i, layer in enumerate(layers)
      if layer.heads != heads
    },
    'mlp_layer_types': ['sparse' if x else 'dense' for x in sparse],
    'swiglu_limits': [
      layer.limit if x else 0.0 for x, layer in zip(sparse, layers, strict=True)
    ],
    'swiglu_limits_shared': [
      layer.shared_limit if x else layer.limit
      for x, layer in zip(sparse, layers, strict=True)
    ],
    'n_routed_experts': moe.experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.width,
    'share_expert_dim': moe.shared_width,
    'moe_router_scaling_factor': moe.scale,
    # A root of a quotient: what it came from has few digits.
    'query_pre_attn_scalar': round(config.head_dim / config.query_scale**2, 9),
  }


STEP = Family(
  name='step',
  model_type='step3p7',
  architecture='Step3p7ForConditionalGeneration',
  rows=_ROWS,
  read=_read,
  write=_write,
  inert=frozenset(
    {
      'att_impl_type',
      'hidden_act',
      'max_seq_len',
      'moe_router_activation',
      'mtp_layer_types',
      'mtp_mlp_layer_types',
      'need_fp32_gate',
      'norm_expert_weight',
      'num_local_experts',
      'sink',
      'use_head_wise_attn_gate',
      'use_moe_router_bias',
      'use_qk_norm',
      'use_rope_layers',
      'yarn_only_types',
      'zero_centered',
    }
  ),
  inside='step3p5',
  around={
    'vision_config': {
      'hidden_size': 16,
      'intermediate_size': 16,
      'num_attention_heads': 2,
      'num_hidden_layers': 1,
      'image_size': 8,
      'patch_size': 2,
    },
    'projector_bias': False,
    'image_token_id': 151679,
  },
  aside=('vision_model.*', 'vit_large_projector.*'),
  after=('model.layers.{layer}.*',),
  aliases={
    'num_attention_groups': 'num_key_value_heads',
    'n_routed_experts': 'num_experts',
    'moe_num_experts': 'num_experts',
    'moe_top_k': 'num_experts_per_tok',
    'share_expert_dims': 'share_expert_dim',
    'num_mtp_layers': 'num_nextn_predict_layers',
  },
  rope_by_type=True,
  modules=(
    ('model.layers.', 'model.language_model.layers.'),
    ('.share_expert.', '.mlp.shared_experts.'),
  ),
  about=(
    'Step 3.5 and 3.7: a gate for each head, heads and rotary embeddings by '
    'type of layer, clamped SwiGLU, experts; config.json of either spelling'
  ),
  limits=(
    'the vision tower and the layers after the last, which predict several '
    'tokens at once, are set aside; files in FP8 are refused'
  ),
)
