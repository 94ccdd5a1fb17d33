"""model/mixers/gated_deltanet.py against loops in float64, and over meshes.

What every mixer must hold is in mixer_contract_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.extend.core import jaxprs_in_params

from gated_jax import Decoder
from gated_jax import ModelConfig
from gated_jax import init_cache
from gated_jax import sharding
from gated_jax.config import DeltaConfig
from gated_jax.config import MeshConfig
from gated_jax.config import MoEConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.accounting import parameters
from gated_jax.model.block import with_remat
from gated_jax.model.mixer import Context
from gated_jax.model.mixers.gated_deltanet import GatedDeltaNet

LINEAR = ModelConfig(
  vocab=32,
  length=16,
  depth=1,
  pattern=('gated_deltanet',),
  width=8,
  heads=2,
  kv_heads=1,
  head_dim=4,
  mlp_width=16,
  dtype='float32',
  init_std=0.5,
  delta=DeltaConfig(2, 4, key_dim=4, value_dim=3, filter_width=3),
)
# Two thirds of the layers are linear, as all of them have experts.
HYBRID = dataclasses.replace(
  LINEAR,
  depth=3,
  heads=4,
  pattern=('gated_deltanet+moe', 'gated_deltanet+moe', 'attention+moe'),
  norm_zero_centered=True,
  delta=DeltaConfig(1, 4, key_dim=4, value_dim=6),
  moe=MoEConfig(experts=4, top_k=2, width=8, shared_width=8, shared_gate=True),
)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def forward(p, x, config):
  """The layer of one row, from the formulas: tokens and heads in loops."""
  d = config.delta
  repeats = d.value_heads // d.key_heads
  filtered = {}
  for name in ('query', 'key', 'value'):
    raw = np.einsum('td,dnh->tnh', x, p[name]['kernel'])
    y = np.zeros_like(raw)
    for t in range(len(x)):
      for back in range(min(d.filter_width, t + 1)):
        y[t] += p[f'{name}_filter'][d.filter_width - 1 - back] * raw[t - back]
    filtered[name] = y * sigmoid(y)
  gate = np.einsum('td,dnh->tnh', x, p['gate']['kernel'])
  beta = sigmoid(x @ p['beta']['kernel'])
  step = x @ p['decay']['kernel'] + p['step_bias']
  decay = np.exp(-np.exp(p['log_rate']) * np.log1p(np.exp(step)))
  output = np.zeros((len(x), d.value_heads, d.value_dim))
  for n in range(d.value_heads):
    state = np.zeros((d.key_dim, d.value_dim))
    for t in range(len(x)):
      q, k = (filtered[i][t, n // repeats] for i in ('query', 'key'))
      q = q / np.sqrt((q * q).sum() + 1e-6) * d.key_dim**-0.5
      k = k / np.sqrt((k * k).sum() + 1e-6)
      state = decay[t, n] * state
      error = filtered['value'][t, n] - k @ state
      state = state + np.outer(k, beta[t, n] * error)
      y = q @ state
      y = y / np.sqrt((y * y).mean() + config.norm_eps) * p['output_scale']
      z = gate[t, n]
      output[t, n] = y * sigmoid(z) * (z if d.gate == 'silu' else 1)
  return np.einsum('tnh,nhd->td', output, p['out']['kernel'])


def random_like(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes
  )


@pytest.mark.parametrize('gate', ['silu', 'sigmoid'])
def test_the_layer_computes_its_formulas(gate):
  delta = dataclasses.replace(LINEAR.delta, gate=gate)
  config = dataclasses.replace(LINEAR, delta=delta)
  layer = GatedDeltaNet(config, config.layers[0])
  x = np.random.default_rng(1).normal(size=(1, 9, 8)).astype(np.float32)
  args = jax.random.key(0), x, Context(), None
  params = random_like(meta.unbox(jax.eval_shape(layer.init, *args)))['params']
  found, _ = jax.jit(layer.apply)({'params': params}, x, Context(), None)
  wide = jax.tree.map(lambda v: v.astype(np.float64), params)
  expected = forward(wide, x[0].astype(np.float64), config)
  np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def batch_of(rows, length):
  rng = np.random.default_rng(2)
  tokens, targets = rng.integers(0, 32, (2, rows, length))
  # Documents end within the parts of a split row, and the last one in padding.
  segments = np.repeat([[1, 2, 3, 0]], [5, 13, length - 20, 2], axis=1)
  starts = np.repeat([[0, 5, 18, length - 2]], [5, 13, length - 20, 2], axis=1)
  return {
    'tokens': tokens,
    'targets': targets,
    'segments': np.repeat(segments, rows, 0),
    'positions': np.repeat(np.arange(length)[None] - starts, rows, 0),
    'weights': np.repeat((segments > 0).astype(np.float32), rows, 0),
  }


def loss_and_gradients(params, batch):
  def total(params):
    loss = Decoder(HYBRID).apply({'params': params}, batch, method='loss')
    return loss.total

  return jax.jit(jax.value_and_grad(total))(params)


@pytest.fixture(scope='module')
def one_device():
  params = random_like(meta.unbox(boxed_parameters(HYBRID)))
  batch = batch_of(4, 32)
  return params, batch, loss_and_gradients(params, batch)


@pytest.mark.nightly
@pytest.mark.parametrize(
  'axes',
  [
    # One key head, for two devices; experts travel, parameters are gathered.
    {'fsdp': 2, 'expert': 2, 'tensor': 2},
    # States, and inputs of the filters, pass from device to device.
    {'context': 4, 'tensor': 2},
    {'data': 2, 'fsdp': 2, 'context': 2},
    {'data': 2, 'tensor': 4},
    {'context': 4, 'expert': 2},
  ],
  ids=str,
)
def test_a_mesh_has_the_loss_and_gradients_of_one_device(one_device, axes):
  params, batch, (loss, gradients) = one_device
  mesh = sharding.make_mesh(MeshConfig(**{'fsdp': 1, **axes}))
  with sharding.activate(mesh):
    boxed = boxed_parameters(HYBRID, 32)
    placed = jax.device_put(params, sharding.shardings(mesh, boxed))
    rows = jax.device_put(batch, sharding.batch_sharding(mesh))
    found, found_gradients = loss_and_gradients(placed, rows)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  paths = jax.tree_util.tree_leaves_with_path(gradients)
  for (path, expected), x in zip(
    paths, jax.tree.leaves(found_gradients), strict=True
  ):
    np.testing.assert_allclose(
      x, expected, atol=2e-4 * np.abs(expected).max(), err_msg=str(path)
    )


def test_a_row_too_short_for_its_filter_is_refused():
  mesh = sharding.make_mesh(MeshConfig(context=8))
  with (
    sharding.activate(mesh),
    pytest.raises(ValueError, match=r'part of 1 tokens .*filter_width=3'),
  ):
    boxed_parameters(LINEAR, 16)


@pytest.mark.long
def test_rows_of_a_cache_can_be_put_in_another_order():
  model = Decoder(dataclasses.replace(HYBRID, scan=False))
  params = random_like(meta.unbox(boxed_parameters(model.config)))
  step = jax.jit(model.apply)
  tokens = batch_of(3, 24)['tokens']
  cache = init_cache(model.config, 3, 16)
  _, cache = step({'params': params}, tokens[:, :9], cache=cache)
  order = np.array([2, 0, 2])
  moved = jax.tree.map(lambda x: x[order], cache)
  found, _ = step({'params': params}, tokens[order, 9:10], cache=moved)
  expected, _ = step({'params': params}, tokens[:, 9:10], cache=cache)
  np.testing.assert_allclose(found, expected[order], atol=1e-5)


def test_the_state_is_float32_and_no_longer_for_longer_texts():
  config = dataclasses.replace(LINEAR, dtype='bfloat16')
  short, long = (init_cache(config, 2, length) for length in (4, 4096))
  assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
  (state,) = short.layers
  assert state.memory.dtype == jnp.float32
  assert state.memory.shape == (1, 2, 4, 4, 3)
  assert {x.dtype for x in state.inputs} == {jnp.dtype('bfloat16')}


def test_parameters_and_flops_are_counted():
  counts, flops = parameters(LINEAR), flops_per_token(LINEAR, 16)
  width, keys, values = 8, 2 * 4, 4 * 3
  matrices = width * (2 * keys + values + 2 * 4) + values * width
  filters = 3 * (2 * keys + values)
  assert counts['gated_deltanet'] == matrices + filters
  assert counts['gate'] == width * values
  # Norms of two blocks and the last one; scale, rates and biases of the layer.
  assert counts['norms'] == 3 * width + 3 + 4 + 4
  assert flops['gated_deltanet_projections'] == 6 * (matrices + filters)
  assert flops['gated_deltanet'] == 3 * 3 * 2 * 4 * 4 * 3
  assert flops_per_token(LINEAR, 64) == flops


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'pattern': ('gated_deltanet:heads=3',)},
      r"'gated_deltanet:heads=3': .* sizes of model.delta, so that heads",
    ),
    ({'pattern': ('gated_deltane',)}, r'did you mean gated_deltanet\?'),
  ],
)
def test_words_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    boxed_parameters(dataclasses.replace(LINEAR, **changes))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'value_heads': 24}, r'delta.value_heads=24 must be a multiple of'),
    ({'gate': 'softplus'}, r"delta.gate='softplus' must be one of silu"),
    ({'filter_width': 0}, r'delta.filter_width=0 must be positive'),
  ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    DeltaConfig(**settings)


def read_calls(jaxpr, name):
  """Calls of a kernel of which anything is read; compilers drop others."""
  read = {id(v) for e in jaxpr.eqns for v in e.invars} | set(
    map(id, jaxpr.outvars)
  )
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      used = any(id(v) in read for v in equation.outvars)
      total += used and name in str(equation.params['name'])
      continue
    for inner in jaxprs_in_params(equation.params):
      total += read_calls(inner, name)
  return total


@pytest.mark.parametrize(('remat', 'runs'), [('full', 2), ('minimal', 1)])
def test_what_the_forward_kernel_saves_is_kept_where_products_are(remat, runs):
  heads = DeltaConfig(1, 1, implementation='pallas_tpu')
  config = dataclasses.replace(LINEAR, delta=heads, remat=remat, scan=False)
  x = jax.ShapeDtypeStruct((1, 128, config.width), jnp.float32)
  block = with_remat(config)(config, config.layers[0])
  plain = dataclasses.replace(config, delta=DeltaConfig(1, 1))
  start = with_remat(plain)(plain, config.layers[0])
  made = jax.eval_shape(
    lambda x: start.init(jax.random.key(0), x, None, Context()), x
  )

  def loss(params, x):
    return jnp.sum(block.apply({'params': params}, x, None, Context())[0])

  program = jax.make_jaxpr(jax.grad(loss))(meta.unbox(made['params']), x)
  assert read_calls(program.jaxpr, 'gated_delta_forward') == runs
