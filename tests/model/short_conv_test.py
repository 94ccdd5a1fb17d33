"""model/mixers/short_conv.py against a loop in float64, and over meshes.

What every mixer must hold is in mixer_contract_test.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import ModelConfig
from gated_jax import init_cache
from gated_jax import sharding
from gated_jax.config import ConvConfig
from gated_jax.config import MeshConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.accounting import parameters
from gated_jax.model.mixer import Context
from gated_jax.model.mixers.short_conv import ShortConv

CONV = ModelConfig(
  vocab=32,
  length=16,
  depth=1,
  pattern=('short_conv',),
  width=8,
  heads=2,
  kv_heads=1,
  head_dim=4,
  mlp_width=16,
  dtype='float32',
  init_std=0.5,
  conv=ConvConfig(filter_width=4, bias=True),
)


def forward(p, x, width):
  """The layer of one row, token by token."""
  gate_in, gate_out, value = (
    x @ p[name]['kernel'] + p[name]['bias']
    for name in ('input_gate', 'output_gate', 'value')
  )
  inputs, output = gate_in * value, np.zeros_like(value)
  for t in range(len(x)):
    y = p['filter_bias'].copy()
    for back in range(min(width, t + 1)):
      y += p['filter'][width - 1 - back] * inputs[t - back]
    output[t] = gate_out[t] * y
  return output @ p['out']['kernel'] + p['out']['bias']


def random_like(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes
  )


def test_the_layer_computes_its_formulas():
  layer = ShortConv(CONV, CONV.layers[0])
  x = np.random.default_rng(1).normal(size=(1, 9, 8)).astype(np.float32)
  args = jax.random.key(0), x, Context(), None
  params = random_like(meta.unbox(jax.eval_shape(layer.init, *args)))['params']
  found, _ = jax.jit(layer.apply)({'params': params}, x, Context(), None)
  wide = jax.tree.map(lambda v: v.astype(np.float64), params)
  expected = forward(wide, x[0].astype(np.float64), 4)
  np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_devices_hand_the_last_inputs_of_a_document_on():
  rng = np.random.default_rng(2)
  tokens, targets = rng.integers(0, 32, (2, 2, 32))
  # Documents end within the parts of a split row, and the last one in padding.
  segments = np.repeat([[1, 2, 3, 0]], [5, 13, 12, 2], axis=1).repeat(2, 0)
  batch = {'tokens': tokens, 'targets': targets, 'segments': segments}
  batch['weights'] = (segments > 0).astype(np.float32)
  params = random_like(meta.unbox(boxed_parameters(CONV)))

  # A program of this size takes longer to optimise than to run.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def slopes(params, batch):
    def total(params):
      loss = Decoder(CONV).apply({'params': params}, batch, method='loss')
      return loss.total

    return jax.value_and_grad(total)(params)

  expected = slopes(params, batch)
  mesh = sharding.make_mesh(MeshConfig(fsdp=1, context=4, tensor=2))
  with sharding.activate(mesh):
    boxed = boxed_parameters(CONV, 32)
    placed = jax.device_put(params, sharding.shardings(mesh, boxed))
    kernel = placed['layers']['short_conv']['value']['kernel']
    assert kernel.sharding.spec[-1] == 'tensor'  # by channels
    found = slopes(placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
  for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


def test_the_state_is_the_last_inputs_and_no_longer_for_longer_texts():
  config = dataclasses.replace(CONV, dtype='bfloat16')
  short, long = (init_cache(config, 2, length) for length in (4, 4096))
  assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
  (state,) = short.layers
  assert (state.shape, state.dtype) == ((1, 2, 3, 8), jnp.bfloat16)


def test_parameters_and_flops_are_counted():
  counts, flops = parameters(CONV), flops_per_token(CONV, 16)
  assert counts['short_conv'] == 4 * 8 * 8 + 4 * 8
  # Norms of two blocks and the last one; biases of all five.
  assert counts['norms'] == 3 * 8 + 5 * 8
  assert flops['short_conv_projections'] == 6 * counts['short_conv']
  assert flops['short_conv'] == 0


@pytest.mark.parametrize(
  ('word', 'message'),
  [
    ('short_conv:window=3', r'sizes of model.conv, so that window'),
    ('short_con', r'did you mean short_conv\?'),
  ],
)
def test_words_that_mean_nothing_are_refused(word, message):
  with pytest.raises(ValueError, match=message):
    boxed_parameters(dataclasses.replace(CONV, pattern=(word,)))


def test_a_filter_of_no_inputs_is_refused():
  with pytest.raises(ValueError, match=r'conv.filter_width=0 must be positive'):
    ConvConfig(filter_width=0)
