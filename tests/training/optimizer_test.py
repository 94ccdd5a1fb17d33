"""Every parameter is updated by the rule of its kind, and by the right one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import OptimizerConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.parameters import Box
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import about
from gated_jax.training import optimizer


def boxed(kind, shape=(2, 4, 3, 2), inputs=0, outputs=0):
  axes = (None,) * len(shape)
  sides = {'inputs': inputs, 'outputs': outputs}
  return Box(jnp.ones(shape), axes, kind=kind, **sides)


# Group and weight decay of each kind, written down a second time: a change of
# the policy has to be meant.
POLICY = {
  Kind.MATRIX: ('matrix', True),
  Kind.EMBEDDING: ('vector', True),
  Kind.ROUTER: ('vector', True),
  Kind.LOAD_BIAS: ('load', False),
  Kind.VECTOR: ('vector', False),
  Kind.FILTER: ('vector', True),
  Kind.BIAS: ('vector', False),
  Kind.DECAY: ('vector', False),
  Kind.GATE: ('gate', True),
  Kind.GATE_SCORES: ('gate', False),
  Kind.ADAPTER: ('vector', True),
}

# The parameters of models with every kind of layer.
KINDS = {
  'embed/embedding': Kind.EMBEDDING,
  'unembed/kernel': Kind.EMBEDDING,
  'final_norm/scale': Kind.VECTOR,
  'attention_norm/scale': Kind.VECTOR,
  'attention_post_norm/scale': Kind.VECTOR,
  'mlp_norm/scale': Kind.VECTOR,
  'mlp_post_norm/scale': Kind.VECTOR,
  'attention/query_norm/scale': Kind.VECTOR,
  'attention/key_norm/scale': Kind.VECTOR,
  'attention/output_norm/scale': Kind.VECTOR,
  'attention/query/kernel': Kind.MATRIX,
  'attention/key/kernel': Kind.MATRIX,
  'attention/value/kernel': Kind.MATRIX,
  'attention/out/kernel': Kind.MATRIX,
  'attention/gate/kernel': Kind.GATE,
  'attention/gate/scores': Kind.GATE_SCORES,
  'gated_deltanet_norm/scale': Kind.VECTOR,
  'gated_deltanet/query/kernel': Kind.MATRIX,
  'gated_deltanet/key/kernel': Kind.MATRIX,
  'gated_deltanet/value/kernel': Kind.MATRIX,
  'gated_deltanet/decay/kernel': Kind.MATRIX,
  'gated_deltanet/beta/kernel': Kind.MATRIX,
  'gated_deltanet/out/kernel': Kind.MATRIX,
  'gated_deltanet/gate/kernel': Kind.GATE,
  'gated_deltanet/query_filter': Kind.FILTER,
  'gated_deltanet/key_filter': Kind.FILTER,
  'gated_deltanet/value_filter': Kind.FILTER,
  'gated_deltanet/log_rate': Kind.DECAY,
  'gated_deltanet/step_bias': Kind.DECAY,
  'gated_deltanet/output_scale': Kind.VECTOR,
  'mlp/gate_proj/kernel': Kind.MATRIX,
  'mlp/up/kernel': Kind.MATRIX,
  'mlp/down/kernel': Kind.MATRIX,
  'moe/router/kernel': Kind.ROUTER,
  'moe/router/bias': Kind.LOAD_BIAS,
  'moe/gate_proj': Kind.MATRIX,
  'moe/up': Kind.MATRIX,
  'moe/down': Kind.MATRIX,
  'moe/shared_gate/kernel': Kind.GATE,
  'moe/shared/gate_proj/kernel': Kind.MATRIX,
  'moe/shared/up/kernel': Kind.MATRIX,
  'moe/shared/down/kernel': Kind.MATRIX,
}
MODELS = (
  {'pattern': ('attention', 'attention+moe'), 'norm': 'sandwich'},
  {'scan': False, 'gate': GateConfig(source='parameter')},
  {'lead': ('gated_deltanet',), 'delta': DeltaConfig(1, 1, 2, 2)},
  {'lead': ('attention',), 'gate': GateConfig(kind='rms_norm')},
)


def test_each_kind_has_the_rule_that_was_meant():
  found = {kind: tuple(rule) for kind, rule in optimizer.RULES.items()}
  assert found == POLICY
  assert set(POLICY) == set(Kind)


def test_every_parameter_of_a_decoder_says_what_it_is():
  seen = set()
  for changes in MODELS:
    experts = 'moe' in str(changes)
    moe = MoEConfig(
      experts=4, top_k=2, width=8, shared_width=8, shared_gate=True, bias=True
    )
    small = {'vocab': 8, 'length': 8, 'depth': 4}
    config = ModelConfig(
      **{**small, 'width': 8, 'heads': 2, 'kv_heads': 1, 'head_dim': 4},
      mlp_width=8,
      tie_embeddings=False,
      moe=moe if experts else MoEConfig(),
      **changes,
    )
    for path, facts in about(boxed_parameters(config)).items():
      name = re.sub(r'^(layers|lead)(_\d+)?/(block_\d/)?', '', '/'.join(path))
      assert facts.kind is KINDS[name], path
      seen.add(name)
  assert seen == set(KINDS)


def test_a_parameter_that_does_not_say_what_it_is_is_refused_by_name():
  params = {'layers': {'mlp': {'gate': jnp.ones(3)}}}
  with pytest.raises(ValueError, match='layers/mlp/gate does not say what it'):
    optimizer.make_optimizer(OptimizerConfig(), 10, params)


def first_update(config, boxes, gradient):
  update = optimizer.make_optimizer(config, 10, boxes)
  params = meta.unbox(boxes)
  found, _ = jax.jit(update.update)(gradient, update.init(params), params)
  return found


def test_only_gates_follow_the_gate_settings():
  boxes = {'gate': boxed(Kind.GATE), 'proj': boxed(Kind.MATRIX)}
  config = OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=0,
    weight_decay=0.5,
    clip_norm=0.0,
    gate_learning_rate=0.1,
    gate_weight_decay=0.0,
  )
  ones = jax.tree.map(jnp.ones_like, meta.unbox(boxes))
  found = first_update(config, boxes, ones)
  # Adam's first update is the sign of the gradient; decay adds 0.5 * 1.
  np.testing.assert_allclose(found['gate'], -1e-4, rtol=1e-5)
  np.testing.assert_allclose(found['proj'], -1.5e-3, rtol=1e-5)


def test_the_bias_of_a_router_steps_against_the_load_and_clips_nothing():
  boxes = {'bias': boxed(Kind.LOAD_BIAS, (3,)), 'm': boxed(Kind.MATRIX, (2, 2))}
  config = OptimizerConfig(
    router_bias_rate=0.01, clip_norm=1.0, warmup_steps=0, weight_decay=0.0
  )
  gradient = {'bias': jnp.array([90.0, 0.0, -1e-3]), 'm': jnp.zeros((2, 2))}
  gradient['m'] += 1e-8  # about as large as Adam's epsilon: a clip would show
  found = first_update(config, boxes, gradient)
  np.testing.assert_allclose(found['bias'], [-0.01, 0, 0.01])
  np.testing.assert_allclose(found['m'], -0.5 * config.learning_rate, rtol=1e-4)


def test_gates_can_be_frozen():
  boxes = {'gate': boxed(Kind.GATE)}
  frozen = OptimizerConfig(gate_learning_rate=0.0)
  found = first_update(frozen, boxes, meta.unbox(boxes))
  assert not np.any(found['gate'])


@pytest.mark.long
def test_muon_makes_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw():
  boxes = {
    'query': boxed(Kind.MATRIX, (3, 16, 2, 4), inputs=1, outputs=2),
    'out': boxed(Kind.MATRIX, (3, 2, 4, 16), inputs=2, outputs=1),
    'gate': boxed(Kind.GATE, (3, 2, 4, 16), inputs=1, outputs=2),
    'embed': boxed(Kind.EMBEDDING, (5, 16)),
  }
  draws = iter(jax.random.split(jax.random.key(0), 9))
  gradient = jax.tree.map(
    lambda x: jax.random.normal(next(draws), x.shape), meta.unbox(boxes)
  )
  config = OptimizerConfig(
    name='muon', warmup_steps=0, weight_decay=0.0, learning_rate=1e-2
  )
  found = first_update(config, boxes, gradient)
  for name, shape in (('query', (3, 16, 8)), ('out', (3, 8, 16))):
    update = np.asarray(found[name]).reshape(shape)
    values = np.linalg.svd(update, compute_uv=False)
    # 0.2 sqrt(max(in, out)) times a singular value near one.
    scale = 1e-2 * 0.2 * np.sqrt(16)
    assert np.all((values > 0.5 * scale) & (values < 1.4 * scale)), values
  gate = np.asarray(found['gate'])
  np.testing.assert_allclose(np.abs(gate), 1e-2, rtol=1e-3)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('constant', [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]),
    ('wsd', [1, 2, 3, 3, 3, 3, 3, 3, 2, 1, 0]),
    # Half a cosine from 3 to 0 over the eight steps after warm-up.
    (
      'cosine',
      [1, 2, *(1.5 + 1.5 * np.cos(np.pi * np.arange(9) / 8))],
    ),
  ],
)
def test_schedules_warm_up_and_end_where_they_should(name, expected):
  config = OptimizerConfig(
    schedule=name,
    learning_rate=3.0,
    final_learning_rate=0.0,
    warmup_steps=2,
    decay_share=0.375,
  )
  schedule = optimizer.make_schedule(config, 10)
  found = [float(schedule(step)) for step in range(11)]
  np.testing.assert_allclose(found, expected, atol=1e-6)
