"""Every parameter is updated by one rule, and by the right one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.config import OptimizerConfig
from gated_jax.training import optimizer


def tree(*paths, shape=(2, 4, 3, 2)):
  """Nested dicts of ones, from slash-separated paths."""
  out = {}
  for path in paths:
    *folders, last = path.split('/')
    here = out
    for name in folders:
      here = here.setdefault(name, {})
    here[last] = jnp.ones(shape)
  return out


@pytest.mark.parametrize(
  ('path', 'group', 'decay'),
  [
    ('embed/embedding', 'vector', True),
    ('unembed/kernel', 'vector', True),
    ('final_norm/scale', 'vector', False),
    ('layers/attention/query/kernel', 'matrix', True),
    ('layers_0/attention/out/kernel', 'matrix', True),
    ('layers/block_1/attention/value/kernel', 'matrix', True),
    ('layers/attention/gate/kernel', 'gate', True),
    ('layers/attention/gate/scores', 'gate', False),
    ('layers/attention/output_norm/scale', 'vector', False),
    ('layers/attention/key_norm/scale', 'vector', False),
    ('layers/mlp_post_norm/scale', 'vector', False),
    ('layers/mlp/gate_proj/kernel', 'matrix', True),
    ('layers/moe/gate_proj', 'matrix', True),
    ('layers/moe/router/kernel', 'vector', True),
    ('layers/moe/shared/gate_proj/kernel', 'matrix', True),
  ],
)
def test_a_path_has_one_rule(path, group, decay):
  rule = optimizer.rule_for(tuple(path.split('/')))
  assert (rule.group, rule.decay) == (group, decay)


@pytest.mark.parametrize(
  'path',
  [
    'layers/attention/gating/kernel',
    'layers/attention/gate/bias',
    'layers/attention/xgate/kernel',
    'layers/mlp/gate/kernel',
    'gate/kernel',
    'kernel',
  ],
)
def test_a_path_that_only_looks_alike_is_refused_by_name(path):
  with pytest.raises(ValueError, match=f'no optimizer rule.*{path}'):
    optimizer.make_optimizer(OptimizerConfig(), 10, tree(path))


def test_a_parameter_covered_twice_is_refused_by_name(monkeypatch):
  more = (*optimizer.RULES, optimizer.Rule('gate/kernel', 'matrix', True))
  monkeypatch.setattr(optimizer, 'RULES', more)
  with pytest.raises(ValueError, match='attention/gate/kernel is covered by'):
    optimizer.rule_for(('layers', 'attention', 'gate', 'kernel'))


def first_update(config, params, gradient):
  update = optimizer.make_optimizer(config, 10, params)
  found, _ = jax.jit(update.update)(gradient, update.init(params), params)
  return found


def test_only_gates_follow_the_gate_settings():
  params = tree('layers/attention/gate/kernel', 'layers/mlp/gate_proj/kernel')
  config = OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=0,
    weight_decay=0.5,
    clip_norm=0.0,
    gate_learning_rate=0.1,
    gate_weight_decay=0.0,
  )
  found = first_update(config, params, jax.tree.map(jnp.ones_like, params))
  # Adam's first update is the sign of the gradient; decay adds 0.5 * 1.
  gate = found['layers']['attention']['gate']['kernel']
  proj = found['layers']['mlp']['gate_proj']['kernel']
  np.testing.assert_allclose(gate, -1e-4, rtol=1e-5)
  np.testing.assert_allclose(proj, -1.5e-3, rtol=1e-5)


def test_gates_can_be_frozen():
  params = tree('layers/attention/gate/kernel')
  found = first_update(OptimizerConfig(gate_learning_rate=0.0), params, params)
  assert not np.any(found['layers']['attention']['gate']['kernel'])


def test_muon_makes_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw():
  params = {
    **tree('layers/attention/query/kernel', shape=(3, 16, 2, 4)),
    **tree('embed/embedding', shape=(5, 16)),
  }
  params['layers']['attention'] |= tree(
    'out/kernel', 'gate/kernel', shape=(3, 2, 4, 16)
  )
  draws = iter(jax.random.split(jax.random.key(0), 9))
  gradient = jax.tree.map(
    lambda x: jax.random.normal(next(draws), x.shape), params
  )
  config = OptimizerConfig(
    name='muon', warmup_steps=0, weight_decay=0.0, learning_rate=1e-2
  )
  found = first_update(config, params, gradient)['layers']['attention']
  for name, shape in (('query', (3, 16, 8)), ('out', (3, 8, 16))):
    update = np.asarray(found[name]['kernel']).reshape(shape)
    values = np.linalg.svd(update, compute_uv=False)
    # 0.2 sqrt(max(in, out)) times a singular value near one.
    scale = 1e-2 * 0.2 * np.sqrt(16)
    assert np.all((values > 0.5 * scale) & (values < 1.4 * scale)), values
  gate = np.asarray(found['gate']['kernel'])
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
