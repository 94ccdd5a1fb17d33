"""A config.json of a family that cannot be: one line, with the value in it."""

import copy
import dataclasses
import json

import pytest

from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.hf.config import family_named
from gated_jax.hf.config import read_config
from gated_jax.hf.config import write_config

NAN, STRETCHED = float('nan'), {'rope_type': 'yarn', 'factor': 2.0}
ROPES = {
  'full_attention': {'rope_theta': 1e4} | STRETCHED,
  'sliding_attention': {'rope_theta': 1e5} | STRETCHED,
}
# The case, what its config.json says otherwise, and the reason that is given.
MUSE = [
  ({'layer_rope_theta': [1.0] * 3}, 'has 3 layer_rope_theta for num_hidden_la'),
  ({'layer_rope_theta': ['x'] * 4}, 'is not a list of finite numbers'),
  ({'hidden_activation': 'gelu'}, "hidden_activation='gelu'"),
  ({'layer_types': ['mamba'] * 4}, "layer 0 is 'mamba'"),
  ({'final_logit_softcapping': -1.0}, r'model\.logit_softcap=-1'),
  ({'output_multiplier': 0}, r'model\.output_scale=0'),
  ({'qk_scale_factor': NAN}, 'qk_scale_factor=nan'),
  ({'tie_word_embeddings': True}, 'tie_word_embeddings=False, and its text_co'),
  (
    {'softcap': 3},
    'text_config of config.json has softcap=3, which is not kno',
  ),
]
LAGUNA = [
  ({'num_attention_heads_per_layer': [4]}, 'has 1 num_attention_heads_per_la'),
  ({'num_attention_heads_per_layer': [3] * 4}, r'model\.heads=3 must be a mul'),
  ({'num_attention_heads_per_layer': ['4'] * 4}, 'is not a list of int'),
  ({'mlp_layer_types': ['thin'] * 4}, "layer 0 is 'thin'"),
  ({'mlp_layer_types': ['dense']}, 'has 1 mlp_layer_types for num_hidden_lay'),
  ({'moe_apply_router_weight_on_input': True}, 'router_weight_on_input=True'),
  ({'rope_parameters': {}}, 'has no rope_parameters of full_attention'),
  ({'rope_parameters': []}, 'rope parameters are no object'),
  ({'rope_parameters': ROPES}, 'stretch rotary embeddings differently'),
  ({'rope_parameters': dict.fromkeys(ROPES, 5)}, 'full_attention are no obj'),
  ({'moe_router_logit_softcapping': -2.0}, r'moe\.softcap=-2'),
]
STEP = [
  ({'swiglu_limits': [1.0]}, 'has 1 swiglu_limits for num_hidden_layers=4'),
  ({'swiglu_limits': [NAN] * 4}, 'is not a list of finite numbers'),
  ({'swiglu_limits': [-7.0] * 4}, r'limit=-7\.0 must not be negative'),
  ({'mlp_bias': True}, 'mlp_bias=True'),
  ({'per_layer_config': {'1': 5}}, '1=5, which is not an object'),
  ({'per_layer_config': [5]}, r'per_layer_config=\[5\], which is not an obje'),
  (
    {'num_sliding_attention_heads': None, 'attention_other_setting': 5},
    'attention_other_setting=5, which is not an object',
  ),
  (
    {'mlp_layer_types': None, 'moe_layers_enum': 'a,b'},
    "moe_layers_enum='a,b', which is no list of layers",
  ),
  ({'query_pre_attn_scalar': 0}, r'query_pre_attn_scalar=0\.0, which is not'),
  (
    {'rope_parameters': None, 'rope_theta': [1e4]},
    'has 1 rope_theta for num_hidden_layers=4',
  ),
]
LFM3 = [
  ({'norm_eps': None}, 'config.json has no norm_eps'),
  ({'norm_eps': 'x'}, "has norm_eps='x', which is not a finite number"),
  ({'layer_types': ['mamba'] * 4}, "layer 0 is 'mamba'"),
  ({'layer_types': ['conv']}, 'has 1 layer_types for num_hidden_layers=4'),
  ({'conv_L_cache': 0}, 'conv_L_cache=0, which is not an integer from 1'),
  ({'conv_bias': 'no'}, "conv_bias='no', which is not true or false"),
  ({'use_sandwich_norm': 1}, 'use_sandwich_norm=1, which is not true or'),
  ({'use_attention_gate': 1}, 'use_attention_gate=1, which is not true or'),
  ({'rope_parameters': {}}, 'has no rope_parameters of full_attention'),
  (
    {'rope_parameters': {kind: {'rope_type': 'axial'} for kind in ROPES}},
    "rope_type 'axial', and the decoder has default",
  ),
]
BEAM = [
  ({'n_group': 3}, r'moe\.experts=8 must be a multiple of moe\.groups=3'),
  ({'topk_group': 5}, r'moe\.top_groups=5'),
  ({'topk_group': 1}, r'moe\.top_k=3'),
  ({'norm_topk_prob': 1}, 'norm_topk_prob=1, which is not true or false'),
  ({'routed_scaling_factor': NAN}, 'routed_scaling_factor=nan'),
  ({'final_logit_softcapping': -1.0}, r'model\.logit_softcap=-1'),
  ({'mlp_layer_types': ['thin'] * 5}, "layer 0 is 'thin'"),
  ({'layer_types': ['conv'] * 5}, "layer 0 is 'conv'"),
  ({'rope_parameters': ROPES}, 'stretch rotary embeddings differently'),
  ({'rope_parameters': {'full_attention': None}}, 'of sliding_attention'),
]
SPARK = [
  ({'mlp_layer_types': ['thin'] * 4}, "layer 0 is 'thin'"),
  ({'mlp_layer_types': ['dense']}, 'has 1 mlp_layer_types for num_hidden_lay'),
  ({'moe_hidden_size': 0}, 'moe_hidden_size=0, which is not an integer from 1'),
  ({'num_local_experts': 'x'}, "num_local_experts='x', which is not an inte"),
  ({'num_experts_per_tok': 5}, r'moe\.top_k=5'),
  ({'residual_gate_temperature': 0}, r'model\.residual_temperature=0'),
  ({'residual_gate_temperature': NAN}, 'residual_gate_temperature=nan'),
  ({'output_multiplier': -1}, r'moe\.logit_scale=-1'),
  ({'routed_scaling_factor': 0.0}, r'moe\.scale=0'),
  ({'layer_rope_theta': [1.0] * 3}, 'has 3 layer_rope_theta for num_hidden_la'),
  ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
  (
    {'rope_parameters': None, 'rope_theta': 1e4},
    'rope_theta=10000.0 and no rope_parameters, without which MuseSpark',
  ),
  (
    {'rope_parameters': {'partial_rotary_factor': 0.5}},
    'partial_rotary_factor=0.5, which MuseSparkForConditionalGeneration does',
  ),
  ({'tie_word_embeddings': True}, 'tie_word_embeddings=False, and its text_co'),
]
OLMO = [
  ({'layer_types': ['conv'] * 4}, "layer 0 is 'conv'"),
  ({'linear_allow_neg_eigval': 2.0}, 'eigval=2.0, which is not true or false'),
  ({'linear_num_key_heads': 3}, 'value_heads=4 must be a multiple of'),
  ({'linear_key_head_dim': 0}, 'linear_key_head_dim=0'),
  (
    {'rope_parameters': {'rope_theta': 5e5, 'partial_rotary_factor': 0.5}},
    'partial_rotary_factor=0.5, which OlmoHybridForCausalLM does not read',
  ),
  ({'rope_parameters': {'rope_theta': 'far'}}, "rope_theta='far'"),
  ({'num_attention_heads': 0}, 'num_attention_heads=0'),
]
BAD = [
  *(('muse_glimmer', *row) for row in MUSE),
  *(('laguna', *row) for row in LAGUNA),
  *(('step', *row) for row in STEP),
  *(('lfm3', *row) for row in LFM3),
  *(('beam', *row) for row in BEAM),
  *(('muse_spark', *row) for row in SPARK),
  *(('olmo_hybrid', *row) for row in OLMO),
]


def changed(values, changes):
  values = copy.deepcopy(values)
  inner = values.get('text_config', values)
  inner |= changes
  return values


@pytest.mark.parametrize(('name', 'changes', 'message'), BAD)
def test_what_cannot_be_is_refused_in_one_line(name, changes, message, cases):
  family, config = cases[name]
  kind = family_named(family)
  values = changed(write_config(config, kind), changes)
  with pytest.raises(ValueError, match=message) as error:
    read_config(values, kind)
  assert '\n' not in str(error.value)


def test_a_table_that_also_makes_logits_is_no_spark(cases):
  _, config = cases['muse_spark']
  kind = family_named('muse_spark')
  values = write_config(config, kind)['text_config']
  with pytest.raises(ValueError, match='has a matrix of its own for the logi'):
    read_config(values | {'tie_word_embeddings': True}, kind)
  tied = dataclasses.replace(config, tie_embeddings=True)
  with pytest.raises(ValueError, match='muse_spark has no words for this mod'):
    write_config(tied, kind)
  wide = dataclasses.replace(config.moe, reduced_width=0)
  wide = dataclasses.replace(config, moe=wide)
  with pytest.raises(ValueError, match=r'no words for model\.moe\.reduced_wid'):
    write_config(wide, kind)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'text_config': 5}, 'has text_config=5, which is no object'),
    ({'softcap': 3}, 'config.json has softcap=3, which is not known'),
  ],
)
def test_so_is_what_stands_around_the_language_model(values, message, cases):
  family, config = cases['muse_glimmer']
  kind = family_named(family)
  with pytest.raises(ValueError, match=message):
    read_config(write_config(config, kind) | values, kind)


def test_both_spellings_of_step_are_the_same_model(cases):
  _, config = cases['step']
  kind = family_named('step')
  values = write_config(config, kind)['text_config']
  ropes = values.pop('rope_parameters')
  full, sliding = (ropes[f'{x}_attention'] for x in ('full', 'sliding'))
  windows = [kind == 'sliding_attention' for kind in values['layer_types']]
  ffns = values.pop('mlp_layer_types')
  sparse = [i for i, ffn in enumerate(ffns) if ffn == 'sparse']
  older = {
    key: values.pop(key)
    for key in ('num_key_value_heads', 'n_routed_experts', 'share_expert_dim')
  }
  heads = values.pop('num_sliding_attention_heads')
  del values['per_layer_config']
  published = values | {
    'model_type': 'step3p5',
    'num_attention_groups': older['num_key_value_heads'],
    'moe_num_experts': older['n_routed_experts'],
    'share_expert_dims': older['share_expert_dim'],
    'attention_other_setting': {'num_attention_heads': heads},
    'moe_layers_enum': ','.join(map(str, sparse)),
    'num_nextn_predict_layers': 2,
    'layer_types': [*values['layer_types'], *['full_attention'] * 2],
    'rope_theta': [
      (sliding if x else full)['rope_theta'] for x in [*windows, 0, 0]
    ],
    'partial_rotary_factors': [
      (sliding if x else full)['partial_rotary_factor']
      for x in [*windows, 0, 0]
    ],
    'rope_scaling': {
      key: value
      for key, value in full.items()
      if key not in ('rope_theta', 'partial_rotary_factor')
    },
    'use_head_wise_attn_gate': True,
    'zero_centered': True,
  }
  assert read_config(published, kind) == config


@pytest.mark.long
def test_a_refused_folder_leaves_nothing(cases, make_params, tmp_path, capsys):
  family, config = cases['step']
  convert.save(tmp_path / 'theirs', make_params(config), config, family)
  path = tmp_path / 'theirs/config.json'
  values = changed(json.loads(path.read_text()), {'mlp_bias': True, 'why': 1})
  path.write_text(json.dumps(values))
  args = ['import', str(tmp_path / 'theirs'), str(tmp_path / 'ours')]
  assert cli.main(args) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert error.index('mlp_bias=True') < error.index('why=1')
  assert [p.name for p in tmp_path.iterdir()] == ['theirs']
