"""hf/config.py: config.json there and back, and what is refused."""

import dataclasses

import pytest

from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.hf.config import choose_family
from gated_jax.hf.config import family_named
from gated_jax.hf.config import find_family
from gated_jax.hf.config import read_config
from gated_jax.hf.config import write_config
from gated_jax.model.accounting import parameters

QWEN3 = {
  'architectures': ['Qwen3ForCausalLM'],
  'model_type': 'qwen3',
  'vocab_size': 64,
  'max_position_embeddings': 32,
  'num_hidden_layers': 4,
  'hidden_size': 32,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 48,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e6,
  'bos_token_id': 151643,
  'transformers_version': '4.51.0',
}
MOE = {
  'model_type': 'qwen3_moe',
  'num_experts': 4,
  'num_experts_per_tok': 2,
  'moe_intermediate_size': 24,
}
NEXT = {'model_type': 'qwen3_next', 'num_experts': 0}
FULL = ['full_attention'] * 4


def read(**changes):
  values = {k: v for k, v in (QWEN3 | changes).items() if v != 'absent'}
  return read_config(values, find_family(values))


def test_reading_back_gives_the_same_model(case):
  family, config = case
  kind = family_named(family)
  values = write_config(config, kind)
  assert find_family(values).name == family
  assert read_config(values, kind) == config


@pytest.mark.long
def test_muse_sparks_defaults_have_the_parameters_of_its_name():
  # 816B-A42B, without the two tables of the vocabulary; the sizes are those of
  # the class in transformers.
  config = read(
    model_type='muse_spark_text', vocab_size=202_048, hidden_size=8192,
    intermediate_size=16_384, num_hidden_layers=62, num_attention_heads=128,
    num_key_value_heads=16, head_dim=64, rope_theta=None,
  )  # fmt: skip
  counts = parameters(config)
  tables = counts['embed'] + counts['unembed']
  assert (counts['total'] - tables) // 10**9 == 816
  assert (counts['active'] - tables) // 10**9 == 42


def test_trinity_is_compiled_as_eight_layers_of_its_thirty_two():
  experts = {
    'num_experts': 128,
    'num_experts_per_tok': 8,
    'moe_intermediate_size': 1024,
    'num_shared_experts': 1,
  }
  values = (
    QWEN3
    | experts
    | {
      'model_type': 'afmoe',
      'num_hidden_layers': 32,
      'num_dense_layers': 2,
      'sliding_window': 2048,
    }
  )
  config = read_config(values, find_family(values))
  assert len(config.lead) == len(config.pattern) == 4
  assert [layer.ffn for layer in config.layers].count('mlp') == 2
  assert [bool(layer.window) for layer in config.layers[:5]] == [1, 1, 1, 0, 1]


def test_all_keys_that_are_missing_are_named_at_once():
  with pytest.raises(ValueError, match=r'has no vocab_size, head_dim; .*gelu'):
    read(vocab_size='absent', head_dim='absent', hidden_act='gelu')


@pytest.mark.parametrize('key', [k for k in QWEN3 if k not in (
  'architectures', 'bos_token_id', 'transformers_version', 'rope_theta')])  # fmt: skip
def test_a_required_key_that_is_missing_is_named(key):
  with pytest.raises(ValueError, match=f'has no {key}'):
    read(**{key: 'absent'})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'.*only 'silu'"),
    ({'attention_bias': 1}, 'attention_bias=1, which is not true or false'),
    ({'attention_dropout': 0.1}, r'attention_dropout=0\.1'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
    ({'rope_scaling': {'rope_type': 'longrope'}}, "rope_type 'longrope'"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, 'config.json has no low_freq_factor'),
    ({'rope_scaling': {'type': 'dynamic'}}, "rope_type 'dynamic'"),
    ({'rope_scaling': {'rope_type': 'linear'}}, 'rope parameters .*no factor'),
    ({'rope_scaling': {'type': 'default', 'why': 1}}, 'why=1, which is not known'),
    ({'rope_scaling': 4}, 'rope parameters are no object'),
    ({'partial_rotary_factor': 0.5}, r'partial_rotary_factor=0\.5'),
    ({'softcap': 30.0}, 'softcap=30.0, which is not known.*--ignore=softcap'),
    ({'model_type': 'llama'}, "model_type 'llama'; only afmoe, beam,"),
    ({'hidden_size': 'wide'}, "hidden_size='wide', which is not an integer"),
    ({'num_hidden_layers': 2.5}, r'num_hidden_layers=2\.5, which is not an'),
    ({'num_key_value_heads': 3}, r'model\.kv_heads=3'),
    ({'dtype': 'float8'}, "model.dtype='float8'"),
    ({'layer_types': FULL[:3]}, '3 layer_types for num_hidden_layers=4'),
    ({'layer_types': [*FULL[:3], 'mamba']}, "layer 3 is 'mamba'"),
    ({'layer_types': ['sliding_attention'] * 4}, "layer 0 is 'sliding_attention'"),
    ({**MOE, 'num_experts': 'absent'}, 'has no num_experts'),
    ({**MOE, 'decoder_sparse_step': 0}, 'decoder_sparse_step=0'),
    ({**MOE, 'mlp_only_layers': ['0']}, r"mlp_only_layers=\['0'\]"),
    ({**MOE, 'num_experts_per_tok': 5}, r'moe\.top_k=5'),
    ({**NEXT, 'layer_types': [*FULL[:3], 'sliding_attention']}, "layer 3 is 'sli"),
    ({**NEXT, 'output_gate_type': 'sigmoid'}, "output_gate_type='sigmoid'"),
    ({**NEXT, 'attn_output_gate': False}, 'attn_output_gate=False'),
    ({**NEXT, 'use_sliding_window': True}, 'use_sliding_window=True'),
    ({**NEXT, 'linear_num_value_heads': 24}, r'delta\.value_heads=24'),
    ({**NEXT, 'num_experts': 4}, r'moe\.top_k=10'),
    ({'model_type': 'afmoe', 'n_group': 2}, 'n_group=2.*experts are in one gro'),
  ],
)  # fmt: skip
def test_what_the_decoder_cannot_compute_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    read(**changes)


def test_a_key_can_be_ignored():
  values = QWEN3 | {'seq_length': 9}
  read_config(values, find_family(values), ignore=['seq_length'])
  read_config(values, find_family(values), ignore=['seq_*'])


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({}, {'pattern': ('attention',)}),
    # transformers 5 puts the base inside.
    (
      {'rope_theta': None, 'rope_parameters': {'rope_theta': 5e5}},
      {'rope.base': 5e5},
    ),
    # Its classes have a base of their own.
    ({'rope_theta': None}, {'rope.base': 1e4}),
    # A window without use_sliding_window does nothing.
    ({'sliding_window': 7}, {'pattern': ('attention',)}),
    (
      {'sliding_window': 7, 'use_sliding_window': True, 'max_window_layers': 1},
      {'pattern': ('attention', 'attention:window=7', 'attention:window=7', 'attention:window=7')},
    ),
    (
      {
        'sliding_window': 7,
        'use_sliding_window': True,
        'layer_types': ['sliding_attention', 'full_attention'] * 2,
      },
      {'pattern': ('attention:window=7', 'attention')},
    ),
    (
      {'rope_scaling': {'type': 'yarn', 'factor': None,
                        'original_max_position_embeddings': 8}},
      {'rope.factor': 4.0, 'rope.original_length': 8, 'rope.beta_fast': 32.0},
    ),
    (
      {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'mscale': 0.7,
                        'mscale_all_dim': 0.9, 'truncate': False}},
      {'rope.factor': 2.0, 'rope.original_length': 32, 'rope.mscale': 0.7,
       'rope.truncate': False},
    ),
    ({**MOE}, {'moe.experts': 4, 'moe.normalize': False}),
    ({**MOE, 'decoder_sparse_step': 2}, {'pattern': ('attention', 'attention+moe')}),
    (
      {**MOE, 'mlp_only_layers': [0]},
      {'lead': ('attention',), 'pattern': ('attention+moe',)},
    ),
    ({**MOE, 'mlp_only_layers': [0, 1, 2, 3]}, {'pattern': ('attention',)}),
    ({'attention_bias': True}, {'qkv_bias': True, 'out_bias': True}),
    (
      {'use_qk_norm': True, 'headwise_attn_output_gate': True, 'qkv_bias': True},
      {'qkv_bias': True, 'out_bias': True, 'gate.bias': True},
    ),
    (
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0,
                        'low_freq_factor': 1.0, 'high_freq_factor': 4.0}},
      {'rope.factor': 8.0, 'rope.high_turns': 4.0, 'rope.original_length': 32},
    ),
    ({**MOE, 'num_experts': None, 'num_local_experts': 8}, {'moe.experts': 8}),
    (
      {**NEXT, 'layer_types': FULL},
      {'rope.fraction': 0.25, 'norm_zero_centered': True,
       'gate.position': 'sdpa_output', 'gate.activation': 'sigmoid'},
    ),
    (
      {**NEXT, 'num_experts': 8, 'mlp_only_layers': [0, 1, 2, 3],
       'full_attention_interval': 1},
      {'pattern': ('attention',)},
    ),
    (
      # Keys of the published form that change nothing.
      {**NEXT, 'output_gate_type': 'swish', 'mlp_only_layers': [],
       'mtp_num_hidden_layers': 1, 'mtp_use_dedicated_embeddings': False,
       'mamba_ssm_dtype': 'float32', 'use_sliding_window': False,
       'linear_conv_kernel_dim': 3},
      {'pattern': ('gated_deltanet',) * 3 + ('attention',),
       'delta.key_heads': 16, 'delta.value_heads': 32, 'delta.filter_width': 3},
    ),
    (
      {**NEXT, 'num_experts': 16, 'mlp_only_layers': [1],
       'norm_topk_prob': False, 'decoder_sparse_step': 1},
      {'pattern': ('gated_deltanet+moe', 'gated_deltanet',
                   'gated_deltanet+moe', 'attention+moe'),
       'moe.top_k': 10, 'moe.shared_gate': True, 'moe.normalize': False},
    ),
    (
      {'model_type': 'qwen3_5_moe_text', 'intermediate_size': None,
       'moe_intermediate_size': 24},
      {'pattern': ('gated_deltanet+moe',) * 3 + ('attention+moe',),
       'mlp_width': 24, 'moe.experts': 256, 'moe.normalize': True},
    ),
    (
      {'model_type': 'lfm3', 'rms_norm_eps': None, 'norm_eps': 3e-5,
       'tie_word_embeddings': None, 'rope_theta': None},
      {'pattern': ('short_conv', 'short_conv', 'attention', 'short_conv'),
       'norm': 'sandwich', 'norm_eps': 3e-5, 'tie_embeddings': True,
       'rope.base': 1e6, 'rope.fraction': 0.5, 'rope.scaling': 'proportional',
       'gate.granularity': 'headwise', 'conv.filter_width': 7},
    ),
    (
      # Absent means the class's own cap, null that there is none.
      {**MOE, 'model_type': 'beam', 'num_experts': 16, 'rope_theta': None},
      {'lead': (), 'logit_softcap': 30.0, 'residual': 'depth_scaled',
       'pattern': (*['attention:window=512'] * 3, 'attention:nope+moe'),
       'query_growth': 0.1, 'moe.groups': 8, 'moe.top_groups': 4,
       'moe.scale': 2.5, 'gate.bias_by_head': True},
    ),
    (
      {**MOE, 'model_type': 'beam', 'num_experts': 16, 'rope_theta': None,
       'layer_types': ['sliding_attention'] * 4,
       'final_logit_softcapping': None, 'tie_word_embeddings': True},
      {'logit_softcap': 0.0, 'query_growth': 0.0, 'tie_embeddings': True},
    ),
    (
      # Null means that there is no rotary embedding, absent the class's own.
      {'model_type': 'olmo_hybrid', 'head_dim': None, 'rope_theta': None,
       'num_key_value_heads': None},
      {'pattern': (*['gated_deltanet'] * 3, 'attention:nope,norm=post'),
       'kv_heads': 4, 'qk_norm_joint': True, 'delta.doubled_beta': True,
       'delta.norm_eps': 1e-5, 'delta.key_heads': 4},
    ),
    (
      {'model_type': 'olmo_hybrid', 'linear_allow_neg_eigval': False,
       'rope_theta': None, 'rope_parameters': {'rope_theta': 5e5}},
      {'pattern': (*['gated_deltanet'] * 3, 'attention:norm=post'),
       'rope.base': 5e5, 'delta.doubled_beta': False},
    ),
    (
      {'model_type': 'muse_spark_text', 'rope_theta': None,
       'mlp_layer_types': ['dense', *['sparse'] * 3], 'num_local_experts': 16},
      {'pattern': ('attention:window=2048',
                   *['attention:window=2048+moe'] * 2, 'attention:nope+moe'),
       'rope.base': 5e5, 'residual': 'gated', 'residual_temperature': 0.3,
       'head_norm': True, 'mixer_post_scale': 'none',
       'ffn_post_scale': 'before', 'moe.experts': 16, 'moe.top_k': 8,
       'moe.width': 4096, 'moe.reduced_width': 4096, 'moe.output_norm': True,
       'moe.logit_scale': 0.1767766952966369, 'moe.bias': True},
    ),
    (
      {'model_type': 'afmoe', 'num_dense_layers': 4, 'sliding_window': 7},
      {'pattern': ('attention:window=7',) * 3 + ('attention:nope',),
       'norm': 'sandwich'},
    ),
    (
      {'model_type': 'afmoe', 'sliding_window': 7, 'num_experts': 8,
       'moe_intermediate_size': 5, 'route_scale': 2.5, 'mup_enabled': True},
      {'lead': (),
       'pattern': ('attention:window=7', 'attention:window=7+moe',
                   'attention:window=7+moe', 'attention:nope+moe'),
       'moe.experts': 8, 'moe.top_k': 6, 'moe.shared_width': 10,
       'moe.score': 'sigmoid', 'moe.bias': True, 'moe.scale': 2.5,
       'embed_scale': QWEN3['hidden_size'] ** 0.5},
    ),
  ],
)  # fmt: skip
def test_settings_read(changes, expected):
  config = read(**changes)
  for name, value in expected.items():
    found = config
    for part in name.split('.'):
      found = getattr(found, part)
    assert found == value, name


def with_gate(**changes):
  return ModelConfig(gate=GateConfig(**changes))


@pytest.mark.parametrize(
  ('config', 'family', 'message'),
  [
    (ModelConfig(), 'qwen3', "model.gate.position='sdpa_output'"),
    (with_gate(position='value'), 'gated_qwen3', "gate.position='value'"),
    (with_gate(shared=True), 'gated_qwen3', 'gate.shared=True'),
    (with_gate(mode='additive'), 'gated_qwen3', "gate.mode='additive'"),
    (with_gate(channels=12), 'gated_qwen3', 'gate.channels=12'),
    (with_gate(source='parameter'), 'gated_qwen3', "gate.source='parameter'"),
    (with_gate(kind='silu'), 'gated_qwen3', "gate.kind='silu'"),
    (with_gate(granularity='headwise'), 'afmoe', "gate.granularity='headwise'"),
    (ModelConfig(rope=RopeConfig(fraction=0.5)), 'qwen3', r'rope\.fraction=0\.5'),
    (ModelConfig(), 'qwen3_next', 'model.norm_zero_centered=False'),
    (ModelConfig(norm='sandwich'), 'gated_qwen3', "model.norm='sandwich'"),
    (
      ModelConfig(pattern=('attention:window=4', 'attention:window=8')),
      'gated_qwen3', r"model.pattern=\['attention:window=4', 'attention:window=8",
    ),
    (
      ModelConfig(pattern=('attention+moe',), moe=MoEConfig(experts=8)),
      'gated_qwen3', 'model.moe.experts=8',
    ),
    (
      ModelConfig(
        pattern=('attention+moe',), moe=MoEConfig(experts=8, shared_width=4)
      ),
      'qwen3_moe', 'model.moe.shared_width=4',
    ),
  ],
)  # fmt: skip
def test_what_a_family_has_no_words_for_is_named(config, family, message):
  with pytest.raises(ValueError, match=f'{family} has no words for.*{message}'):
    write_config(config, family_named(family))


def test_settings_that_change_nothing_are_no_reason_to_refuse():
  config = ModelConfig(
    pattern=('attention', 'attention'),
    remat='full',
    dropout=0.1,
    gate=GateConfig(position='none', granularity='headwise'),
  )
  assert choose_family(config).name == 'qwen3'


def test_the_family_is_chosen_by_what_it_can_say(case):
  family, config = case
  chosen = choose_family(config).name
  # They are one model, but for experts whose weights do not sum to one.
  same = {'qwen3_next': 'qwen3_5'} if config.moe.normalize else {}
  plain = config.gate.position == 'none' and not config.qk_norm_joint
  if plain and config.qk_norm:
    assert chosen in ('qwen3', 'qwen3_moe')
  else:
    assert chosen == same.get(family, family)
  with pytest.raises(ValueError, match=r'(?s)no family describes.*value'):
    choose_family(
      dataclasses.replace(config, gate=GateConfig(position='value'))
    )


def test_an_unknown_family_lists_the_known():
  with pytest.raises(ValueError, match="no family 'gpt'; there are qwen3, "):
    family_named('gpt')


def test_all_that_is_refused_is_said_at_once_what_matters_first():
  wrong = {
    'attention_dropout': 0.1,
    'softcap': 30.0,
    'layer_types': ['mamba', *FULL[1:]],
    'rope_scaling': {'rope_type': 'longrope'},
  }
  with pytest.raises(ValueError) as error:
    read(**wrong)
  reasons = str(error.value).split('; ')
  assert [r.split(',')[0].rsplit(' ', 1)[1] for r in reasons[:1]] == ["'mamba'"]
  for word in ('attention_dropout=0.1', "'longrope'", 'softcap=30.0'):
    assert sum(word in reason for reason in reasons) == 1
  assert '\n' not in str(error.value)


def test_what_stops_the_reading_is_said_with_what_was_refused_before():
  wrong = {'attention_dropout': 0.1, 'layer_types': FULL[:3]}
  with pytest.raises(ValueError, match=r'3 layer_types.*; .*attention_dropout'):
    read(**wrong)


@pytest.mark.parametrize('name', ['qwen3', 'trinity', 'muse_glimmer', 'step'])
def test_keys_that_say_that_there_is_none_of_it_are_accepted(name, cases):
  family, config = cases[name]
  kind = family_named(family)
  values = write_config(config, kind)
  off = {
    'use_sliding_window': False,
    'mlp_only_layers': [],
    'qkv_bias': False,
    'mtp_num_hidden_layers': 1,
  }
  inner = values.get('text_config', values)
  inner |= {key: value for key, value in off.items() if key not in inner}
  assert read_config(values, kind) == config
  inner['qkv_bias'] = True
  with pytest.raises(ValueError, match='qkv_bias=True'):
    read_config(values, kind)
