"""The NNX module: Flax's contract for NNX, and the linen module's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gated_jax
from gated_jax.nnx import GatedAttention

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

D, HEADS = 8, 2
GATES = ['none', 'elementwise', 'headwise', 'key', 'dense_output']


def drawn(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


X = drawn(2, 5, D)


def module(**fields):
  fields = {'num_heads': HEADS, 'in_features': D, 'rngs': nnx.Rngs(0)} | fields
  return GatedAttention(**fields)


def flax_module(**fields):
  return nnx.MultiHeadAttention(
    HEADS, D, decode=False, rngs=nnx.Rngs(0), **fields
  )


FIELDS = {
  'defaults': {},
  'without biases': {'use_bias': False},
  'widths': {'qkv_features': 12, 'out_features': 3, 'in_kv_features': 6},
  'grouped': {'num_kv_heads': 1},
  'normed': {'normalize_qk': True},
  'initialisers': {
    'kernel_init': nnx.initializers.normal(0.3),
    'out_bias_init': nnx.initializers.ones,
  },
}


@pytest.mark.parametrize('name', FIELDS)
def test_same_parameters_initial_values_and_numbers_as_flax(name):
  fields = FIELDS[name]
  theirs, ours = flax_module(**fields), module(gate='none', **fields)
  states = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (theirs, ours)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(a, b)
  inputs = (X, drawn(2, 7, 6)) if 'in_kv_features' in fields else (X,)
  mask = np.random.default_rng(0).random((2, 1, 5, inputs[-1].shape[1])) < 0.7
  mask[..., 0] = True
  np.testing.assert_allclose(
    ours(*inputs, mask=mask), theirs(*inputs, mask=mask), atol=1e-5
  )


@pytest.mark.parametrize('gate', GATES)
def test_the_linen_module_gives_the_same_numbers_to_the_bit(gate):
  fields = {'gate': gate, 'num_kv_heads': 1, 'causal': True}
  ours = module(**fields)
  linen = gated_jax.GatedAttention(HEADS, **fields)
  params = ours.linen_parameters()
  shapes = jax.eval_shape(linen.init, jax.random.key(0), X)['params']
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  np.testing.assert_array_equal(ours(X), linen.apply({'params': params}, X))


def test_dropout_draws_what_flax_draws():
  fields = {'dropout_rate': 0.5, 'deterministic': False}
  theirs, ours = flax_module(**fields), module(gate='none', **fields)
  first = ours(X)
  np.testing.assert_allclose(first, theirs(X), atol=1e-6)
  assert np.abs(ours(X) - first).max() > 1e-3
  ours.eval()
  np.testing.assert_array_equal(ours(X), ours(X))
  stored_nothing = module(dropout_rate=0.5, keep_rngs=False)
  y = stored_nothing(X, deterministic=False, rngs=nnx.Rngs(dropout=3))
  again = stored_nothing(X, deterministic=False, rngs=nnx.Rngs(dropout=3))
  np.testing.assert_array_equal(y, again)


def test_attention_weights_are_kept_where_they_are_asked_for():
  theirs, ours = flax_module(), module(gate='none')
  for m in (theirs, ours):
    m(X, sow_weights=True)
  weights = [nnx.pop(m, nnx.Intermediate) for m in (theirs, ours)]
  a, b = (jax.tree.leaves(w) for w in weights)
  np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('gate', ['none', 'headwise'])
def test_decoding_token_by_token_is_one_causal_pass(gate):
  ours = module(gate=gate, decode=True)
  ours.init_cache(X.shape)

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  def step(model, x):
    return model, model(x)

  _, y = step(ours, X.swapaxes(0, 1)[:, :, None])
  whole = ours(X, decode=False, is_causal=True)
  np.testing.assert_allclose(y[:, :, 0].swapaxes(0, 1), whole, atol=1e-5)
  assert ours.cache_index[...] == 5


def loss(model, x=X):
  return jnp.mean((model(x) - 1) ** 2)


def test_gradients_and_an_optimizer_reach_the_gate():
  model = module(gate='headwise')
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  before = model.gate.kernel[...]

  @nnx.jit
  def step(model, optimizer):
    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value

  losses = [step(model, optimizer) for _ in range(20)]
  assert losses[-1] < 0.8 * losses[0]
  assert np.abs(model.gate.kernel[...] - before).max() > 1e-3


def test_split_and_merge_give_the_module_back():
  model = module(gate='elementwise')
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  assert not jax.tree.leaves(rest)
  merged = nnx.merge(graph, params, rest)
  np.testing.assert_array_equal(merged(X), model(X))
  y = jax.jit(lambda p: nnx.merge(graph, p, rest)(X))(params)
  np.testing.assert_allclose(y, model(X), atol=1e-6)


def test_stacked_layers_under_vmap_scan_and_remat():
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(key):
    return module(rngs=nnx.Rngs(key), gate='headwise')

  layers = make(jax.random.split(jax.random.key(0), 3))
  assert layers.gate.kernel.shape == (3, D, HEADS)

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  @nnx.remat
  def run(x, layer):
    return x + layer(x)

  graph, state = nnx.split(layers)
  expected = X
  for i in range(3):
    layer = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
    expected = expected + layer(expected)
  np.testing.assert_allclose(run(X, layers), expected, atol=1e-5)
  gradient = nnx.grad(lambda layers: jnp.sum(run(X, layers) ** 2))(layers)
  assert np.abs(gradient['gate']['kernel'][...]).min() > 0


def test_parameters_lie_where_their_metadata_say():
  mesh = jax.make_mesh((2,), ('tp',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    model = module(
      kernel_metadata={'out_sharding': (None, 'tp', None)},
      out_kernel_metadata={'out_sharding': ('tp', None, None)},
      gate='headwise',
      gate_metadata={'out_sharding': (None, 'tp')},
    )
    y = nnx.jit(lambda model, x: model(x))(model, X)
  assert model.gate.kernel[...].sharding.spec == P(None, 'tp')
  assert model.out.kernel[...].sharding.spec == P('tp')
  np.testing.assert_allclose(y, module(gate='headwise')(X), atol=1e-5)


@pytest.mark.parametrize(('fields', 'inputs', 'more', 'message'), [
  ({'gate': 'hedwise'}, (X,), {}, 'did you mean headwise'),
  ({}, (X[..., 1:],), {}, r'inputs_q of shape \(2, 5, 7\) must have 8'),
  ({}, (X, X[..., 1:]), {}, r'inputs_k of shape \(2, 5, 7\) must have 8'),
  ({'in_kv_features': 6}, (X,), {}, 'in_kv_features=6 needs inputs_k'),
  ({'dropout_rate': 0.5}, (X,), {}, 'needs deterministic'),
  ({'decode': True}, (X,), {}, 'call init_cache first'),
  (
    {'dropout_rate': 0.5, 'keep_rngs': False}, (X,), {'deterministic': False},
    'keep_rngs=False',
  ),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
  fields, inputs, more, message
):
  with pytest.raises(ValueError, match=message) as error:
    module(**fields)(*inputs, **more)
  assert '\n' not in str(error.value)
