"""Plain values to settings: what fits goes in, the rest is refused by name."""

import dataclasses
import json
import math
import re
import string

import hypothesis
import pytest
from hypothesis import strategies as st

from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import different_function
from gated_jax.config import from_dict
from gated_jax.config import names_with
from gated_jax.config import to_dict
from gated_jax.config.gate import ACTIVATIONS
from gated_jax.config.roles import ROLES


def leaves(values, path=()):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from leaves(value, (*path, name))
    else:
      yield (*path, name), value


PATHS = dict(leaves(to_dict(RunConfig())))
anything = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.text(max_size=5),
  st.lists(st.integers(), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def put(path, value):
  for name in reversed(path):
    value = {name: value}
  return value


def test_settings_survive_json():
  config = RunConfig(
    model=ModelConfig(depth=4, pattern=('attention:window=128', 'attention'))
  )
  assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@hypothesis.given(st.sampled_from(sorted(PATHS)), anything)
@hypothesis.example(('model', 'init_std'), 2**53 + 1)
@hypothesis.example(('model', 'init_std'), 10**400)
def test_any_value_is_taken_as_it_is_or_refused_with_its_name(path, value):
  try:
    config = from_dict(put(path, value))
  except ValueError as error:
    assert '\n' not in str(error)
    assert any(name in str(error) for name in path)
    return
  found = dict(leaves(to_dict(config)))[path]
  assert type(found) is type(PATHS[path])
  assert found == (tuple(value) if isinstance(found, tuple) else value)


@hypothesis.given(st.text(string.ascii_lowercase + '_', min_size=1))
def test_names_that_are_no_settings_are_refused(name):
  hypothesis.assume(name not in {f.name for f in dataclasses.fields(RunConfig)})
  with pytest.raises(ValueError, match=f'no setting {name}'):
    from_dict({name: 1})


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'stpes': 3}, 'no setting stpes; did you mean steps?'),
    ({'model': {'widht': 3}}, 'no setting model.widht; did you mean model.wid'),
    ({'model': {'gate': {'postion': 'key'}}}, 'did you mean model.gate.pos'),
    ({'model': 3}, 'model=3 must be a group of settings'),
    ({'steps': 3.0}, 'steps=3.0 must be of type int, not float'),
    ({'steps': True}, 'steps=True must be of type int, not bool'),
    ({'steps': 2**31}, 'steps=2147483648 must be below 2**31'),
    ({'seed': 2**31}, 'seed=2147483648 must lie in [0, 2**31)'),
    ({'seed': -1}, 'seed=-1 must lie in [0, 2**31)'),
    ({'model': {'vocab': 10**12}}, 'model.vocab=1000000000000 must be below'),
    (
      {'model': {'pattern': ['attention', 3]}},
      'model.pattern=3 must be of type',
    ),
    (
      {'model': {'windows': [0]}},
      'no setting model.windows any more: layers are words now, such as model.p',
    ),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ValueError) as error:
    from_dict(values)
  assert message in str(error.value)


# What cannot be meant, and the reason that is given.
REFUSED = [
  ({'model.gate.position': 'output'}, "gate.position='output' must be one of"),
  ({'model.gate.activation': 'tanh'}, "gate.activation='tanh' must be one of"),
  ({'model.gate.kind': 'norm'}, "gate.kind='norm' must be one of"),
  ({'model.gate.channels': -1}, 'gate.channels=-1 must not be negative'),
  (
    {'model.gate.channels': 3000},
    'channels=3000 must be at most model.width=20',
  ),
  (
    {'model.gate.kind': 'silu', 'model.gate.position': 'value'},
    "position='value' must be sdpa_output",
  ),
  (
    {'model.gate.kind': 'rms_norm', 'model.gate.granularity': 'headwise'},
    'has no scores, so granularity would change nothing',
  ),
  (
    {
      'model.gate.position': 'dense_output',
      'model.gate.granularity': 'headwise',
    },
    'has no heads to act on',
  ),
  (
    {'model.gate.position': 'dense_output', 'model.gate.shared': True},
    'averages over heads, and there are none',
  ),
  (
    {'model.gate.shared': True, 'model.gate.granularity': 'headwise'},
    'together they leave one per token',
  ),
  (
    {'model.gate.source': 'parameter', 'model.gate.channels': 8},
    "channels=8 chooses inputs, and source='parameter' has none",
  ),
  (
    {'model.gate.position': 'key', 'model.gate.granularity': 'headwise'},
    'model.qk_norm=True takes their scale away',
  ),
  (
    {'model.heads': 12},
    'model.heads=12 must be a multiple of model.kv_heads=8',
  ),
  ({'model.head_dim': 33}, 'model.head_dim=33 must be even'),
  ({'model.depth': 0}, 'model.depth=0 must be positive'),
  (
    {'model.pattern': ('attention',) * 3},
    'model.depth=28 must be a multiple of the 3 words of model.pattern',
  ),
  ({'model.pattern': ()}, 'the 0 words of model.pattern'),
  (
    {'model.lead': ('attention',), 'model.pattern': ('attention',) * 2},
    'multiple of the 2 words of model.pattern after the 1 of model.lead',
  ),
  (
    {'model.lead': ('attention',) * 29},
    'model.lead has 29 words for model.depth=28 layers',
  ),
  (
    {'model.pattern': ('attention:window=-1',)},
    "layer 'attention:window=-1': window=-1 must not be negative",
  ),
  (
    {'model.pattern': ('attention:window=1000000000000',)},
    'window=1000000000000 must be below 2**31',
  ),
  (
    {'model.pattern': ('attention:windw=3',)},
    "attention has no field 'windw'; did you mean window?",
  ),
  (
    {'model.pattern': ('attention:window=a',)},
    "window='a' must be of type int",
  ),
  (
    {'model.pattern': ('attention:window=1,window=2',)},
    "layer 'attention:window=1,window=2' says window twice",
  ),
  (
    {'model.pattern': ('attention:nope=1',)},
    'nope takes no value',
  ),
  (
    {'model.pattern': ('attention:nope,rope_base=1e6',)},
    'has no rotary embedding (nope), so rope_base would do nothing',
  ),
  (
    {'model.pattern': ('attention:nope,rope_scaling=none',)},
    'so rope_scaling would do nothing',
  ),
  (
    {'model.pattern': ('attention:rope_scaling=yarn',)},
    "rope_scaling='yarn' can only be none",
  ),
  (
    {'model.pattern': ('attention+moe:shared_limit=7',)},
    'has no shared expert (moe.shared_width=0), so shared_limit would do noth',
  ),
  (
    {'model.pattern': ('attention+mlp:limit=-7',)},
    'limit=-7.0 must not be negative',
  ),
  (
    {'model.pattern': ('attention+mlp:limit=nan',)},
    'limit=nan must not be negative',
  ),
  ({'model.moe.softcap': -1.0}, 'moe.softcap=-1.0 must not be negative'),
  ({'model.logit_softcap': -1.0}, 'logit_softcap=-1.0 must not be negative'),
  ({'model.output_scale': 0.0}, 'output_scale=0.0 must be positive'),
  ({'model.query_scale': -1.0}, 'query_scale=-1.0 must be positive'),
  (
    {'model.post_norm_eps': 1e-8},
    "post_norm_eps=1e-08 does nothing without model.norm='sandwich'",
  ),
  (
    {'model.final_norm_plain': True},
    'final_norm_plain=True does nothing without model.norm_zero_centered=True',
  ),
  (
    {'model.qk_norm_scale': False, 'model.qk_norm': False},
    'qk_norm_scale=False does nothing without model.qk_norm=True',
  ),
  (
    {'model.qk_norm_joint': True, 'model.qk_norm': False},
    'qk_norm_joint=True does nothing without model.qk_norm=True',
  ),
  (
    {'model.ffn_post_scale': 'before'},
    "ffn_post_scale='before' does nothing without model.norm='sandwich' or",
  ),
  (
    {'model.mixer_post_scale': 'none'},
    "mixer_post_scale='none' does nothing without model.norm='sandwich' or",
  ),
  (
    {'model.norm': 'post', 'model.mixer_post_scale': 'beside'},
    "mixer_post_scale='beside' must be one of after, before, none",
  ),
  (
    {'model.residual_temperature': 0.3},
    "residual_temperature=0.3 does nothing without model.residual='gated'",
  ),
  (
    {'model.residual': 'gated', 'model.residual_temperature': 0.0},
    'residual_temperature=0.0 must be positive',
  ),
  (
    {'model.head_norm': True, 'model.pattern': ('gated_deltanet',)},
    'head_norm=True does nothing without a layer that attends',
  ),
  ({'model.moe.reduced_width': -1}, 'moe.reduced_width=-1 must not be nega'),
  ({'model.moe.logit_scale': 0.0}, 'moe.logit_scale=0.0 must be positive'),
  ({'model.delta.norm_eps': -1.0}, 'delta.norm_eps=-1.0'),
  (
    {'model.pattern': ('attention:norm=around',)},
    "norm='around' must be one of",
  ),
  (
    {'model.gate.bias_by_head': True},
    'bias_by_head=True needs gate.bias=True',
  ),
  (
    {
      'model.gate.bias_by_head': True,
      'model.gate.bias': True,
      'model.gate.granularity': 'headwise',
    },
    'bias_by_head=True does nothing with',
  ),
  (
    {
      'model.gate.bias_by_head': True,
      'model.gate.bias': True,
      'model.gate.position': 'dense_output',
    },
    'bias_by_head=True has no heads to act on',
  ),
  ({'model.query_growth': 0.1}, 'does nothing without a layer without rotary'),
  ({'model.residual': 'mean'}, "residual='mean' must be one of sum, depth_sc"),
  (
    {'model.gate.source': 'parameter', 'model.gate.bias': True},
    "adds to logits that source='parameter' stores already",
  ),
  ({'model.rope.scaling': 'llama3'}, "'llama3' needs rope.original_length"),
  (
    {
      'model.rope.scaling': 'llama3',
      'model.rope.original_length': 8,
      'model.rope.low_turns': 4.0,
    },
    'rope.low_turns=4.0 must lie between 0 and rope.high_turns=4.0',
  ),
  (
    {'model.pattern': ('attention+mo',)},
    "layer 'attention+mo' has no feed-forward block 'mo'; did you mean moe?",
  ),
  ({'model.pattern': ('attention mlp',)}, 'must be written as'),
  (
    {'model.pattern': ('attention:heads=12',)},
    "must be a multiple of model.kv_heads=8 in layer 'attention:heads=12'",
  ),
  ({'model.moe.experts': 4, 'model.moe.top_k': 2}, 'and no layer has experts'),
  (
    {'model.moe.groups': 3},
    'moe.experts=128 must be a multiple of moe.groups=3',
  ),
  (
    {'model.moe.top_groups': 2},
    'moe.top_groups=2 must be at most moe.groups=1',
  ),
  (
    {'model.moe.groups': 32},
    'moe.top_k=8 experts cannot be chosen from 4 in moe.top_groups=1 of',
  ),
  ({'model.moe.score': 'relu'}, "moe.score='relu' must be one of softmax, si"),
  ({'model.dropout': 1.0}, 'model.dropout=1.0 must lie in [0, 1)'),
  ({'model.attention': 'flash'}, "model.attention='flash' must be one of auto"),
  ({'model.dtype': 'float64'}, "model.dtype='float64' must be one of"),
  ({'model.rope.fraction': 1.5}, 'rope.fraction=1.5 must be at most 1'),
  ({'model.rope.fraction': 0.01}, 'must be an even number of channels'),
  ({'model.rope.fraction': 0.4}, 'must be an even number of channels'),
  ({'model.rope.factor': 2.0}, "does nothing with rope.scaling='none'"),
  ({'model.rope.factor': 0.5}, 'rope.factor=0.5 must be at least 1'),
  ({'model.rope.scaling': 'yarn'}, 'needs rope.original_length'),
  (
    {'model.moe.experts': 4, 'model.moe.top_k': 8},
    'moe.top_k=8 experts cannot be chosen from moe.experts=4',
  ),
  ({'data.length': 8192}, 'longer than the model.length=4096'),
  ({'data.source': 'web'}, "data.source='web' must be one of"),
  ({'data.source': 'text'}, "data.source='text' needs data.paths"),
  (
    {'data.paths': 'a'},
    "data.paths='a' does nothing with data.source='stdlib'",
  ),
  ({'data.mixture': ('1:stdlib',)}, "does nothing with data.source='stdlib'"),
  ({'data.source': 'mixture'}, 'needs data.mixture'),
  ({'data.validation': 1.0}, 'data.validation=1.0 must lie in [0, 1)'),
  ({'data.tokenizer': ''}, "data.tokenizer='' must be 'bytes' or a path"),
  (
    {'optimizer.name': 'sgd'},
    "optimizer.name='sgd' must be one of adamw, muon",
  ),
  ({'optimizer.schedule': 'linear'}, "schedule='linear' must be one of"),
  ({'optimizer.decay_share': 0.0}, 'decay_share=0.0 must lie in (0, 1]'),
  ({'optimizer.b2': 1.0}, 'optimizer.b2=1.0 must lie in [0, 1)'),
  (
    {'optimizer.gate_learning_rate': 0.0, 'model.gate.init': 'zeros'},
    'gate_learning_rate=0.0 never updates a gate that starts with the same',
  ),
  (
    {'model.moe.experts': 4, 'model.moe.top_k': 1},
    'moe.top_k=1 with moe.normalize=True gives the one chosen expert weight 1',
  ),
  ({'data.batch': 2 * 10**9}, 'rows of data.length=256 are 512000000000 token'),
  ({'optimizer.accumulate': 3}, 'data.batch=8 must be a multiple of'),
  (
    {'optimizer.warmup_steps': 2000},
    'warmup_steps=2000 is more than steps=1000',
  ),
  ({'mesh.data': 0}, 'mesh.data=0 must be positive, or -1'),
  ({'mesh.data': -1}, 'only one mesh axis may be -1'),
  ({'mesh.slice_axis': 'tensor'}, "slice_axis='tensor' must be one of"),
  ({'checkpoint.keep_last': 0}, 'checkpoint.keep_last=0 must be positive'),
  ({'checkpoint.every': -1}, 'checkpoint.every=-1 must not be negative'),
  ({'steps': 0}, 'steps=0 must be positive'),
  ({'profile_steps': -1}, 'profile_steps=-1 must not be negative'),
]


@pytest.mark.parametrize(('values', 'message'), REFUSED)
def test_what_cannot_be_meant_is_refused_with_the_reason(values, message):
  nested = {}
  for name, value in values.items():
    *groups, last = name.split('.')
    here = nested
    for group in groups:
      here = here.setdefault(group, {})
    here[last] = value
  with pytest.raises(ValueError) as error:
    from_dict(nested)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


FLOATS = sorted(
  path for path, value in leaves(to_dict(RunConfig())) if type(value) is float
)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('path', FLOATS)
def test_no_float_takes_what_is_not_finite(path, value):
  name = '.'.join(path).removeprefix('model.')
  with pytest.raises(
    ValueError, match=f'{re.escape(name)}={value} must be a f'
  ):
    from_dict(put(path, value))


def test_every_setting_says_its_role_once():
  config = RunConfig()
  by_role = {role: names_with(config, role) for role in ROLES}
  every = {'.'.join(path) for path, _ in leaves(to_dict(config))}
  assert frozenset().union(*by_role.values()) == every
  assert sum(map(len, by_role.values())) == len(every)
  assert {'model.width', 'model.gate.position'} <= by_role['model']
  assert {'seed', 'data.seed', 'model.dropout'} <= by_role['execution']
  assert {'steps', 'mesh.fsdp', 'data.paths'} <= by_role['free']


def test_every_gate_of_the_paper_that_means_something_is_taken():
  heads = ('query', 'key', 'value', 'sdpa_output')
  for position in (*heads, 'dense_output'):
    for mode in ('multiplicative', 'additive'):
      GateConfig(position=position, mode=mode)
      GateConfig(position=position, source='parameter', mode=mode)
  for position in heads:
    GateConfig(position=position, granularity='headwise')
    GateConfig(position=position, shared=True)
  for activation in ACTIVATIONS:
    GateConfig(activation=activation)
  assert GateConfig() == GateConfig(
    position='sdpa_output',
    kind='gate',
    granularity='elementwise',
    shared=False,
    mode='multiplicative',
    activation='sigmoid',
    source='hidden',
    channels=0,
    bias=False,
    init='normal',
    dtype='float32',
  )


def test_differences_show_both_values():
  old = to_dict(RunConfig())
  new = to_dict(RunConfig(steps=5000, model=ModelConfig(width=64)))
  assert differences(old, new) == {
    'steps': (1000, 5000),
    'model.width': (2048, 64),
  }
  assert not differences(json.loads(json.dumps(old)), old)
  assert differences({'gone': 1}, {}) == {'gone': (1, '(none)')}


def test_how_a_model_is_said_does_not_decide_its_function():
  long = RopeConfig(scaling='yarn', factor=2.0, original_length=8)
  short = RopeConfig(base=100.0)
  said = ModelConfig(
    depth=2,
    rope=long,
    pattern=('attention', 'attention:heads=8,rope_scaling=none,rope_base=100'),
  )
  again = dataclasses.replace(
    said,
    heads=8,
    lead=('attention:heads=16',),
    pattern=('attention:rope_base=100,rope_scaling=none',),
  )
  assert said.layers == again.layers and said.layers[1].rope == short
  assert different_function(said, again) == {}
  other = dataclasses.replace(said, rope=dataclasses.replace(long, factor=3.0))
  assert different_function(said, other) == {'rope.factor': (2.0, 3.0)}
