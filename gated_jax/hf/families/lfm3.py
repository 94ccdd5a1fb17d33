"""LFM3: short convolutions, windows, and global layers with half a rotation.

Attention has a gate for each head; norms stand on both sides of each block, or
before it alone.
"""

from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.family import in_words
from gated_jax.hf.families.rows import COMMON
from gated_jax.hf.families.rows import PLAIN_QUERY
from gated_jax.hf.families.rows import SEPARATE_GATE
from gated_jax.hf.families.rows import layer_rows
from gated_jax.hf.families.rows import renamed
from gated_jax.hf.keys import Keys
from gated_jax.hf.keys import read_types
from gated_jax.hf.keys import write_layer_types
from gated_jax.hf.names import Row
from gated_jax.hf.rope import read_ropes
from gated_jax.hf.rope import widest
from gated_jax.hf.rope import write_ropes


def _conv(*names: str) -> tuple[str, ...]:
  """Paths of parameters of a layer that is a short convolution."""
  return tuple(f'short_conv/{name}' for name in names)


# Thirds of the joined projection, in their order.
_THIRDS = ('input_gate', 'output_gate', 'value')
_NORMS = tuple(
  Row(f'{theirs}.weight', (f'{mixer}{ours}/scale',), inputs=0)
  for theirs, ours in (
    ('operator_norm', '_norm'),
    ('post_operator_norm', '_post_norm'),
  )
  for mixer in ('attention', 'short_conv')
)
_ROWS = (
  *(
    row
    for row in renamed(COMMON, 'model.norm.', 'model.embedding_norm.')
    if row.ours != ('attention_norm/scale',)
  ),
  *PLAIN_QUERY,
  *SEPARATE_GATE,
  *layer_rows(
    *_NORMS,
    Row('ffn_norm.weight', ('mlp_norm/scale',), inputs=0),
    Row('post_ffn_norm.weight', ('mlp_post_norm/scale',), inputs=0),
    Row('feed_forward.w1.weight', ('mlp/gate_proj/kernel',)),
    Row('feed_forward.w3.weight', ('mlp/up/kernel',)),
    Row('feed_forward.w2.weight', ('mlp/down/kernel',)),
    Row('conv.in_proj.weight', _conv(*(f'{x}/kernel' for x in _THIRDS))),
    Row(
      'conv.in_proj.bias', _conv(*(f'{x}/bias' for x in _THIRDS)), vector=True
    ),
    Row('conv.conv.weight', _conv('filter'), filter=True),
    Row('conv.conv.bias', _conv('filter_bias'), vector=True),
    Row('conv.out_proj.weight', _conv('out/kernel')),
    Row('conv.out_proj.bias', _conv('out/bias'), vector=True),
  ),
)
_ROPES: dict[str, dict[str, Any]] = {
  'full_attention': {
    'rope_type': 'proportional',
    'rope_theta': 1e6,
    'partial_rotary_factor': 0.5,
  },
  'sliding_attention': {'rope_theta': 1e4},
}


def _default_type(layer: int) -> str:
  """The type of a layer by its number, where config.json has no list."""
  if layer % 4 == 2:
    return 'full_attention'
  return 'sliding_attention' if layer and layer % 4 == 0 else 'conv'


def _read(keys: Keys, depth: int) -> dict[str, Any]:
  taken = keys.taken
  default = [_default_type(layer) for layer in range(depth)]
  types = read_types(keys, 'layer_types', default, (*_ROPES, 'conv'))
  window = keys.integer('sliding_window', 256)
  length = taken['max_position_embeddings']
  attending = [kind for kind in types if kind != 'conv']
  ropes = read_ropes(keys, length, attending, _ROPES)
  layers = [
    LayerSpec(
      mixer='short_conv' if kind == 'conv' else 'attention',
      window=window if kind == 'sliding_attention' else 0,
      rope=ropes.get(kind),
      heads=taken['num_attention_heads'],
      kv_heads=taken['num_key_value_heads'],
      head_dim=taken['head_dim'],
      ffn='mlp',
      ffn_width=taken['intermediate_size'],
    )
    for kind in types
  ]
  gated = keys.flag('use_attention_gate', True)
  sandwich = keys.flag('use_sandwich_norm', True)
  return in_words(keys, layers, widest(ropes.values()), {}) | {
    'norm': 'sandwich' if sandwich else 'pre',
    'gate': {
      'position': 'sdpa_output' if gated else 'none',
      'granularity': 'headwise',
    },
    'conv': {
      'filter_width': keys.integer('conv_L_cache', 7),
      'bias': keys.flag('conv_bias', False),
    },
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  types = write_layer_types(config)
  return {
    **types,
    # The class makes masks of windows even where no layer has one.
    'sliding_window': types['sliding_window'] or config.length,
    **write_ropes(config.layers),
    'conv_L_cache': config.conv.filter_width,
    'conv_bias': config.conv.bias,
    'use_attention_gate': config.gate.position != 'none',
    'use_sandwich_norm': config.norm == 'sandwich',
    # The class has one by default, which may lie beyond the vocabulary.
    'pad_token_id': None,
  }


LFM3 = Family(
  name='lfm3',
  model_type='lfm3',
  architecture='Lfm3ForCausalLM',
  rows=_ROWS,
  read=_read,
  write=_write,
  spelled={'rms_norm_eps': 'norm_eps'},
  tied=True,
  rope_by_type=True,
  modules=(('.self_attn.gate_proj.', '.self_attn.g_proj.'),),
  about=(
    'short convolutions between gates, attention with a gate for each head, '
    'windows, a rotary embedding that turns half of the pairs, norms on both '
    'sides or before alone'
  ),
)
