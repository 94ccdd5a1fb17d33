"""What Flax promises of its attention, asked of Flax's module and of ours.

Without a gate both must agree: parameter tree, initial values, numbers. With a
gate there is no second module, so the promise is checked against itself: one
row alone, one token at a time, one layer at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax import GateConfig
from gated_jax import GatedAttention
from gated_jax import GatedSelfAttention

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

D, HEADS = 8, 2
FLAX = nn.MultiHeadDotProductAttention
GATES = ['none', 'elementwise', 'headwise', 'value', 'dense_output']
KEYS = {'params': jax.random.key(1), 'dropout': jax.random.key(2)}


def drawn(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return rng.normal(size=shape).astype(np.float32)


def some_mask(*shape):
  mask = np.random.default_rng(list(shape)).random(shape) < 0.5
  mask[..., 0] = True
  return mask


def redrawn(tree):
  """Other values, so that biases and scales are not what they start as."""
  leaves, structure = jax.tree.flatten(tree)
  values = [drawn(*x.shape, seed=i) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(structure, values)


def both(**fields):
  return FLAX(HEADS, **fields), GatedAttention(HEADS, gate='none', **fields)


def assert_same_tree(theirs, ours):
  assert jax.tree.structure(theirs) == jax.tree.structure(ours)
  for a, b in zip(*map(jax.tree.leaves, (theirs, ours)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


X, Y, Z = drawn(2, 5, D), drawn(2, 7, 6), drawn(2, 7, 4)
normal, ones = nn.initializers.normal(0.3), nn.initializers.ones
# Fields of the module, positional arguments, and those with a name.
CALLS = {
  'defaults': ({}, (X,), {}),
  'without biases': ({'use_bias': False}, (X,), {}),
  'initialisers': ({'kernel_init': normal, 'bias_init': ones}, (X,), {}),
  'of the output': (
    {'out_kernel_init': normal, 'out_bias_init': ones}, (X,), {}
  ),
  'widths': ({'qkv_features': 12, 'out_features': 3}, (X,), {}),
  'normed': ({'normalize_qk': True}, (X,), {}),
  'precision': ({'precision': 'highest'}, (X,), {}),
  'bfloat16 parameters': ({'param_dtype': jnp.bfloat16}, (X,), {}),
  'keys': ({}, (X, Y), {}),
  'keys and values': ({}, (X, Y, Z), {}),
  'keys and values at once': ({}, (X,), {'inputs_kv': Y}),
  'no batch': ({}, (X[0],), {}),
  'two batch axes': ({}, (drawn(2, 3, 5, D),), {}),
  'two batch axes, a mask for each': (
    {}, (drawn(2, 3, 5, D),), {'mask': some_mask(2, 3, 1, 5, 5)}
  ),
  'two batch axes, a mask for one': (
    {}, (drawn(2, 3, 5, D),), {'mask': some_mask(1, 3, 2, 5, 5)}
  ),
  'causal, in numbers': ({}, (X,), {'mask': nn.make_causal_mask(X[..., 0])}),
  'padding': (
    {}, (X, Y),
    {'mask': nn.make_attention_mask(np.ones((2, 5)), np.arange(7) < [[3], [6]])},
  ),
  'mask of two axes': ({}, (X,), {'mask': some_mask(5, 5)}),
  'mask for each head': ({}, (X,), {'mask': some_mask(HEADS, 5, 5)}),
  'mask of keys': ({}, (X,), {'mask': some_mask(2, 1, 1, 5)}),
  'no batch, a mask': ({}, (X[0],), {'mask': some_mask(5, 5)}),
  'weights': ({}, (X,), {'sow_weights': True}),
  'weights of two batch axes': (
    {}, (drawn(2, 3, 5, D),), {'sow_weights': True, 'mask': some_mask(5, 5)}
  ),
  'dropout': ({'dropout_rate': 0.5}, (X,), {'deterministic': False}),
  'dropout of the field': (
    {'dropout_rate': 0.5, 'deterministic': False}, (X,), {}
  ),
  'dropout, row by row': (
    {'dropout_rate': 0.5, 'broadcast_dropout': False}, (X,),
    {'deterministic': False},
  ),
  'dropout by a key': (
    {'dropout_rate': 0.5}, (drawn(2, 3, 5, D),),
    {'deterministic': False, 'dropout_rng': jax.random.key(7)},
  ),
  'no dropout': ({'dropout_rate': 0.5}, (X,), {'deterministic': True}),
}  # fmt: skip


@pytest.mark.parametrize('name', CALLS)
def test_same_parameters_same_initial_values_same_numbers(name):
  fields, inputs, more = CALLS[name]
  theirs, ours = both(**fields)
  kinds = {**more, 'sow_weights': False}
  params = theirs.init(KEYS, *inputs, **kinds)
  own = ours.init(KEYS, *inputs, **kinds)
  assert_same_tree(params, own)
  for a, b in zip(*map(jax.tree.leaves, (params, own)), strict=True):
    np.testing.assert_array_equal(a, b)
  if name == 'bfloat16 parameters':
    return  # Flax rounds the softmax too
  params = redrawn(params)
  results = [
    module.apply(params, *inputs, rngs=KEYS, mutable='intermediates', **more)
    for module in (theirs, ours)
  ]
  assert_same_tree(*results)


@pytest.mark.parametrize('name', ['causal, in numbers', 'normed', 'dropout'])
def test_same_derivatives_backward_and_forward(name):
  fields, inputs, more = CALLS[name]
  modules = both(**fields)
  params = redrawn(modules[0].init(KEYS, *inputs, **more))
  weights = drawn(2, 5, D, seed=3)
  step = redrawn(inputs)

  def loss(module, params, *inputs):
    y = module.apply(params, *inputs, rngs=KEYS, **more)
    return jnp.sum(weights * y**2)

  def derivatives(module):
    def of(params, *inputs):
      return loss(module, params, *inputs)

    def along(x):
      return jax.jvp(lambda *x: of(params, *x), x, step)[1]

    gradient = jax.grad(of, (0, 1))(params, *inputs)
    return gradient, jax.jvp(along, (inputs,), (step,))

  assert_same_tree(
    *(jax.jit(derivatives, static_argnums=0)(m) for m in modules)
  )


def test_hessian_of_a_gated_layer_is_symmetric_and_not_zero():
  module = GatedAttention(HEADS, gate='headwise')
  x = drawn(3, D)
  params = module.init(KEYS, x)

  def loss(x):
    return jnp.sum(module.apply(params, x) ** 2)

  hessian = jax.jit(jax.hessian(loss))(x).reshape(3 * D, 3 * D)
  np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
  assert np.abs(hessian).max() > 1e-2


@pytest.mark.parametrize('param_dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('dtype', [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('x_dtype', [jnp.bfloat16, jnp.float32])
def test_dtypes_follow_the_same_rule(param_dtype, dtype, x_dtype):
  results = []
  for module in both(dtype=dtype, normalize_qk=True):
    params = module.init(KEYS, X)
    params = jax.tree.map(lambda p: p.astype(param_dtype), params)
    result = jax.eval_shape(module.apply, params, X.astype(x_dtype))
    results.append(result.dtype)
  assert results[0] == results[1]


@pytest.mark.parametrize('batch', [(), (2,), (2, 3)])
def test_decoding_token_by_token_is_flax_decoding(batch):
  modules = both(decode=True)
  x = drawn(*batch, 4, D)
  variables = [jax.jit(module.init)(KEYS, x) for module in modules]
  assert_same_tree(*variables)
  params = redrawn(variables[0]['params'])
  results = []
  for module, start in zip(modules, variables, strict=True):

    def step(cache, x, module=module):
      tree = {'params': params, 'cache': cache}
      y, new = module.apply(tree, x, mutable='cache')
      return new['cache'], (y, new['cache'])

    tokens = jnp.moveaxis(x, -2, 0)[..., None, :]
    results.append(jax.jit(jax.lax.scan, static_argnums=0)(
      step, start['cache'], tokens
    ))  # fmt: skip
  assert_same_tree(*results)


@pytest.mark.parametrize('fields', [
  *({'gate': gate} for gate in GATES),
  {'num_kv_heads': 1, 'window': 2, 'qk_norm': True},
  {'normalize_qk': True, 'gate': GateConfig(activation='silu', mode='additive')},
])  # fmt: skip
def test_decoding_token_by_token_is_one_causal_pass(fields):
  whole = GatedAttention(HEADS, causal=True, **fields)
  single = whole.clone(decode=True)
  variables = jax.jit(single.init)(KEYS, X)
  params, cache = redrawn(variables['params']), variables['cache']
  mask = some_mask(2, 1, 1, 5)

  @jax.jit
  def step(cache, x):
    return single.apply(
      {'params': params, 'cache': cache}, x, mask=mask, mutable='cache'
    )

  outputs = []
  for t in range(5):
    y, new = step(cache, X[:, t : t + 1])
    cache = new['cache']
    outputs.append(y)
  np.testing.assert_allclose(
    jnp.concatenate(outputs, 1),
    whole.apply({'params': params}, X, mask=mask),
    rtol=1e-4,
    atol=1e-4,
  )


class Stack(nn.Module):
  """Two layers by one of Flax's lifted transforms, as users write them."""

  attention: type[nn.Module]
  fields: dict
  how: str

  @nn.compact
  def __call__(self, x):
    if self.how == 'scan':
      layers = nn.scan(
        lambda module, x, _: (module(x), None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=2,
      )
      return layers(self.attention(HEADS, **self.fields), x, None)[0]
    if self.how == 'vmap':
      layers = nn.vmap(
        self.attention,
        variable_axes={'params': 0},
        split_rngs={'params': True},
      )
      return layers(HEADS, **self.fields)(jnp.stack([x, x]))
    lift = {'remat': nn.remat, 'jit': nn.jit}[self.how]
    return lift(self.attention)(HEADS, **self.fields)(x)


@pytest.mark.parametrize('how', ['scan', 'vmap', 'remat', 'jit'])
def test_lifted_transforms_need_no_word_about_boxes(how):
  theirs = Stack(FLAX, {}, how)
  ours = Stack(GatedAttention, {'gate': 'none'}, how)
  gated = Stack(GatedAttention, {'gate': 'headwise'}, how)

  @jax.jit
  def run():
    params = theirs.init(KEYS, X)
    own, with_gate = (m.init(KEYS, X)['params'] for m in (ours, gated))
    (layer,), (own_layer,) = params['params'].values(), own.values()
    renamed = {'params': dict.fromkeys(own, layer)}

    def loss(params):
      return jnp.sum(gated.apply({'params': params}, X) ** 2)

    (gradient,) = jax.grad(loss)(with_gate).values()
    outputs = theirs.apply(params, X), ours.apply(renamed, X)
    return layer, own_layer, outputs, gradient['gate']['kernel']

  layer, own_layer, outputs, gradient = run()
  if how in ('scan', 'vmap'):
    assert own_layer['query']['kernel'].shape == (2, D, HEADS, D // HEADS)
  assert jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, own_layer)
  np.testing.assert_allclose(*outputs, atol=1e-5)
  assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize('gate', GATES)
def test_batch_axes_are_independent_with_any_gate(gate):
  module = GatedAttention(HEADS, gate=gate, num_kv_heads=1, causal=True)
  params = module.init(KEYS, X)
  x, mask = drawn(2, 2, 5, D), some_mask(2, 2, 1, 5, 5)
  run = jax.jit(lambda x, mask: module.apply(params, x, mask=mask))
  whole = run(x, mask)
  for i in np.ndindex(2, 2):
    np.testing.assert_allclose(whole[i], run(x[i], mask[i]), atol=1e-5)


def test_causality_and_a_mask_apply_together():
  fields, params = both()[1], both()[0].init(KEYS, X)
  mask = some_mask(2, 1, 5, 5).astype(np.float32)
  causal = nn.make_causal_mask(X[..., 0])
  np.testing.assert_allclose(
    fields.clone(causal=True).apply(params, X, mask=mask),
    FLAX(HEADS).apply(params, X, mask=nn.combine_masks(mask, causal)),
    atol=1e-5,
  )


@pytest.mark.parametrize('sow_weights', [False, True])
def test_a_query_that_sees_nothing_gives_the_bias_of_the_output(sow_weights):
  _, module = both()
  params = redrawn(module.init(KEYS, X))
  mask = np.ones((5, 5), bool)
  mask[2] = False
  y = module.apply(params, X, mask=mask, sow_weights=sow_weights)
  bias = params['params']['out']['bias']
  np.testing.assert_array_equal(y[:, 2], np.broadcast_to(bias, (2, D)))


def test_self_attention_is_flax_self_attention():
  arguments = {'mask': some_mask(5, 5), 'deterministic': True}
  with pytest.warns(DeprecationWarning):
    params = nn.SelfAttention(HEADS).init(KEYS, X)
    theirs = nn.SelfAttention(HEADS).apply(params, X, *arguments.values())
  ours = GatedSelfAttention(HEADS, gate='none')
  assert_same_tree(params, ours.init(KEYS, X))
  assert_same_tree(theirs, ours.apply(params, X, *arguments.values()))
  with pytest.raises(TypeError, match='positional'):
    ours.apply(params, X, X, X, X, False, X)


@pytest.mark.parametrize(('word', 'config'), [
  ('none', GateConfig(position='none')),
  ('elementwise', GateConfig()),
  ('headwise', GateConfig(granularity='headwise')),
  ('key', GateConfig(position='key')),
])  # fmt: skip
def test_a_word_says_a_gate(word, config):
  trees = [
    jax.eval_shape(GatedAttention(HEADS, gate=gate).init, KEYS, X)
    for gate in (word, config)
  ]
  assert trees[0] == trees[1]


def test_parameters_are_plain_arrays_unless_asked_for_names():
  plain = GatedAttention(HEADS, qk_norm=True)
  tree = plain.init(KEYS, X)
  assert all(isinstance(x, jax.Array) for x in tree['params']['gate'].values())
  assert tree['params']['query']['kernel'].shape == (D, HEADS, D // HEADS)
  named = plain.clone(logical_axes=True).init(KEYS, X)
  specs = nn.get_partition_spec(named)['params']
  assert tuple(specs['query']['kernel']) == ('embed', 'heads', 'head_dim')
  assert tuple(specs['query']['bias']) == ('heads', 'head_dim')
  assert_same_tree(tree, nn.unbox(named))


def test_a_standard_deviation_takes_the_place_of_initialisers():
  module = GatedAttention(HEADS, qkv_features=500, init_std=0.02)
  params = jax.jit(module.init)(KEYS, drawn(1, 2, 32))['params']
  for name in ('query', 'key', 'value', 'out'):
    # 16,000 draws: 3% is five times their own deviation.
    std = np.std(params[name]['kernel'])
    np.testing.assert_allclose(std, 0.02, rtol=0.03)


@pytest.mark.parametrize(('fields', 'inputs', 'more', 'message'), [
  ({'gate': 'hedwise'}, (X,), {}, "gate='hedwise' .* did you mean headwise"),
  ({'gate': True}, (X,), {}, 'gate=True must be a GateConfig or one of'),
  ({'qkv_features': 9}, (X,), {}, 'qkv_features=9 .* num_heads=2'),
  ({'num_kv_heads': 3}, (X,), {}, 'num_heads=2 .* num_kv_heads=3'),
  ({'window': 2}, (X,), {}, 'window=2 needs causal=True'),
  ({'normalize_qk': True, 'qk_norm': True}, (X,), {}, 'excludes qk_norm'),
  ({'implementation': 'fast'}, (X,), {}, "implementation='fast'"),
  ({'dropout_rate': 0.5}, (X,), {}, 'deterministic'),
  ({}, (X,), {'mask': some_mask(4, 5)}, r'mask of shape \(4, 5\) must broadc'),
  ({}, (X,), {'mask': some_mask(1, 2, 1, 5, 5)}, 'mask of shape'),
  ({}, (X[0, 0],), {}, r'inputs_q of shape \(8,\) must be \[\*batch'),
  ({}, (X, None, Y), {}, 'inputs_v needs inputs_k'),
  ({}, (X, Y), {'inputs_kv': Y}, 'inputs_kv excludes'),
  ({}, (X, Y[:1]), {}, r'inputs_k .* batch axes of inputs_q, \(2,\)'),
  ({}, (X, Y, Z[:, 1:]), {}, 'must be of one length'),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
  fields, inputs, more, message
):
  with pytest.raises((ValueError, TypeError), match=message) as error:
    GatedAttention(HEADS, **fields).init(KEYS, *inputs, **more)
  assert '\n' not in str(error.value)


def test_a_cache_takes_one_token_at_a_time():
  module = GatedAttention(HEADS, decode=True)
  variables = module.init(KEYS, X)
  with pytest.raises(ValueError, match='decode=True takes one token at a time'):
    module.apply(variables, X, mutable='cache')
