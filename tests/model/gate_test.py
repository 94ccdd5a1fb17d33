"""The gate's parameters: names, shapes, axes and logits, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.config import GateConfig
from gated_jax.model.gate import Gate
from gated_jax.model.gate import gate_logits
from gated_jax.model.multi_head import GatedAttention

B, T, D, N, K, H = 2, 3, 12, 4, 2, 5

# Position and granularity: the kernel's outputs, and their logical axes.
TABLE = [
  ('query', 'elementwise', (N, H), ('heads', 'head_dim')),
  ('query', 'headwise', (N,), ('heads',)),
  ('key', 'elementwise', (K, H), ('kv_heads', 'head_dim')),
  ('key', 'headwise', (K,), ('kv_heads',)),
  ('value', 'elementwise', (K, H), ('kv_heads', 'head_dim')),
  ('value', 'headwise', (K,), ('kv_heads',)),
  ('sdpa_output', 'elementwise', (N, H), ('heads', 'head_dim')),
  ('sdpa_output', 'headwise', (N,), ('heads',)),
  ('dense_output', 'elementwise', (D,), (None,)),
]


def parameters(gate):
  """Of a layer with this gate, in their boxes."""
  layer = GatedAttention(
    num_heads=N,
    num_kv_heads=K,
    qkv_features=N * H,
    gate=gate,
    logical_axes=True,
  )
  x = jax.ShapeDtypeStruct((B, T, D), np.float32)
  return jax.eval_shape(layer.init, jax.random.key(0), x)['params']


@pytest.mark.parametrize(('position', 'granularity', 'shape', 'axes'), TABLE)
def test_parameters_stand_apart_and_are_shaped_as_what_they_gate(
  position, granularity, shape, axes
):
  def box_of(name, **more):
    gate = GateConfig(position=position, granularity=granularity, **more)
    found = parameters(gate)['gate']
    assert set(found) == {name}
    return found[name]

  kernel = box_of('kernel')
  assert (kernel.value.shape, kernel.names) == ((D, *shape), ('embed', *axes))
  # Few inputs are on every device.
  few = box_of('kernel', channels=3)
  assert (few.value.shape, few.names) == ((3, *shape), (None, *axes))
  scores = box_of('scores', source='parameter')
  assert (scores.value.shape, scores.names) == (shape, axes)


@pytest.mark.parametrize(
  'gate',
  [
    GateConfig(position='none'),
    GateConfig(kind='silu'),
    GateConfig(kind='rms_norm'),
    GateConfig(kind='exclusive'),
    GateConfig(kind='sink_logit'),
  ],
)
def test_without_scores_there_are_no_parameters_for_them(gate):
  assert 'gate' not in parameters(gate)


def test_logits_read_the_first_channels_and_nothing_else():
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  config = GateConfig(channels=3, init_std=1.0)
  module = Gate(config, D, (N, H), ('heads', None))
  variables = module.init(jax.random.key(0))
  matrix = module.apply(variables)
  found = gate_logits(config, matrix, x, 'float32')
  kernel = variables['params']['kernel'].value
  np.testing.assert_allclose(
    found, np.einsum('btc,cnh->btnh', x[..., :3], kernel), rtol=1e-4, atol=1e-5
  )
  x = x.at[..., 3:].set(0)
  again = gate_logits(config, matrix, x, 'float32')
  np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize('granularity', ['elementwise', 'headwise'])
def test_logits_of_a_parameter_are_the_same_for_every_token(granularity):
  config = GateConfig(source='parameter', granularity=granularity, init_std=1.0)
  module = Gate(config, D, (N, H), ('heads', 'head_dim'))
  matrix, _ = module.init_with_output(jax.random.key(0))
  logits = gate_logits(config, matrix, jnp.ones((B, T, D)), 'float32')
  assert logits.shape == (1, 1, N, H if granularity == 'elementwise' else 1)


@pytest.mark.parametrize('source', ['hidden', 'parameter'])
def test_initial_values_are_as_asked_for(source):
  def start(**settings):
    config = GateConfig(source=source, **settings)
    module = Gate(config, 200, (40, 50), ('heads', 'head_dim'))
    (leaf,) = jax.tree.leaves(module.init(jax.random.key(0)))
    return np.asarray(leaf)

  assert not start(init='zeros').any()
  # 2000 draws and more: 8% is five times their own deviation.
  np.testing.assert_allclose(start().std(), 0.02, rtol=0.08)
  np.testing.assert_allclose(start(init_std=0.5).std(), 0.5, rtol=0.08)
