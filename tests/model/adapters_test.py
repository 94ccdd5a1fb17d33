"""Adapters change nothing at first, and what they say once they are trained."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from gated_jax.config import DeltaConfig
from gated_jax.config import LoraConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.decode.weights import for_decoding
from gated_jax.model import accounting
from gated_jax.model import adapters
from gated_jax.model import parameters
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.model.linear import Matrix
from gated_jax.model.linear import project
from gated_jax.model.linear import project_both
from gated_jax.model.low_rank import Adapter

BASE = ModelConfig(
  vocab=32, length=16, depth=3, width=16, heads=4, kv_heads=2, head_dim=8,
  mlp_width=24, dtype='float32', lead=('gated_deltanet',),
  pattern=('attention+moe',), delta=DeltaConfig(1, 2, 4, 8),
  moe=MoEConfig(experts=4, top_k=2, width=8, shared_width=8, shared_gate=True),
  lora=LoraConfig(rank=2, alpha=3.0),
)  # fmt: skip
KEY = jax.random.key(0)
TOKENS = np.arange(16).reshape(2, 8) % 32
# The letters of a matrix's axes, those of A and of B; r is the rank.
EQUATIONS = {
  'gated_deltanet/out/kernel': 'NHr,rD->NHD',
  'attention/out/kernel': 'lNHr,lrD->lNHD',
  'attention/query/kernel': 'lDr,lrNH->lDNH',
  'attention/gate/kernel': 'lDr,lrNH->lDNH',
  'moe/up': 'lEDr,lErF->lEDF',
  'moe/down': 'lEFr,lErD->lEFD',
  'moe/shared_gate/kernel': 'lDr,lrO->lDO',
}


@pytest.fixture(scope='module')
def params():
  """Parameters in which no adapter is zero."""
  boxed = boxed_parameters(BASE)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype),
    meta.unbox(boxed),
  )


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  return Decoder(config).apply({'params': params}, TOKENS)


class Owner(nn.Module):
  """Owns a matrix, and knows nothing of adapters."""

  config: ModelConfig

  @nn.compact
  def __call__(self):
    kind, ones = parameters.Kind.MATRIX, nn.initializers.ones
    return parameters.parameter(
      self, 'w', (3, 4), ('embed', 'mlp'), kind, init=ones, inputs=1
    )


def test_a_product_begins_at_zero_in_whatever_owns_a_matrix():
  w, made = Owner(BASE).init_with_output(jax.random.key(0))
  np.testing.assert_array_equal(w, np.ones((3, 4)))
  a, b = (made['params'][f'w_lora_{side}'] for side in ('a', 'b'))
  assert (a.names, b.names) == (('embed', None), (None, 'mlp'))
  assert a.value.shape == (3, 2) and 0 < np.abs(a.value).max() < 3**-0.5
  assert b.value.shape == (2, 4) and not np.any(b.value)


@pytest.mark.long
def test_the_first_step_is_the_bases(params):
  """With a base in a narrower type than its adapters.

  Operation by operation it is so to the bit; a compiler may add up the same
  numbers in another order.
  """
  config = dataclasses.replace(BASE, param_dtype='bfloat16')
  like = meta.unbox(boxed_parameters(config))
  stored = jax.tree_util.tree_map_with_path(
    lambda path, x, like: x.astype(like.dtype) * ('_lora_b' not in str(path)),
    params,
    like,
  )
  base = adapters.without(stored)
  found = logits(config, stored)
  expected = logits(adapters.plain(config), base)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  narrow = {x.dtype.name for x in jax.tree.leaves(base)}
  assert 'bfloat16' in narrow, 'the base is stored as it is asked for'
  names = traverse_util.flatten_dict(stored, sep='/')
  assert {
    x.dtype.name for name, x in names.items() if '_lora_' in name
  } == {'float32'}  # fmt: skip


@pytest.mark.long
def test_every_matrix_becomes_what_the_equation_says(params):
  config, merged = adapters.merge(BASE, params)
  assert not config.lora.rank
  flat = traverse_util.flatten_dict(params, sep='/')
  after = traverse_util.flatten_dict(merged, sep='/')
  assert not any('_lora_' in name for name in after)
  for end, equation in EQUATIONS.items():
    (name,) = [x for x in after if x.endswith(end) and 'shared/' not in x]
    a, b = (
      np.float64(flat[f'{name}_lora_{side}']) for side in ('a', 'b')
    )  # fmt: skip
    expected = flat[name] + 1.5 * np.einsum(equation, a, b)
    np.testing.assert_allclose(after[name], expected, atol=1e-6)
  expected = logits(config, merged)
  np.testing.assert_allclose(logits(BASE, params), expected, atol=1e-4)
  assert np.abs(logits(config, adapters.without(params)) - expected).max() > 0.1


def drawn_matrix(shape, axes, inputs=1):
  """A matrix with an adapter, and the sum of both in float64."""
  rng = np.random.default_rng(len(shape))
  w, a, b = (
    rng.normal(size=size).astype('float32')
    for size in (shape, (*shape[:inputs], 2), (2, *shape[inputs:]))
  )
  adapter = Adapter(jnp.array(a), jnp.array(b), 1.5, inputs)
  total = w + 1.5 * np.tensordot(np.float64(a), b, 1)
  return Matrix(jnp.array(w), axes, inputs, adapter=adapter), total


def test_a_product_beside_the_matrix_is_that_of_the_sum():
  """With one input axis and with two, alone and where products are shared."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 3, 4)).astype('float32')
  wide, w = drawn_matrix((4, 5, 2), ('embed', 'kv_heads', None))
  narrow, v = drawn_matrix((4, 6), ('embed', 'heads'))
  expected = np.tensordot(x, w, 1), np.tensordot(x, v, 1)
  apart = project(x, wide, 'float32'), project(x, narrow, 'float32')
  for found in (apart, project_both(x, wide, narrow, 'float32')):
    for ours, theirs in zip(found, expected, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-5)
  out, u = drawn_matrix((4, 5, 3), ('heads', None, 'embed'), 2)
  y = rng.normal(size=(2, 3, 4, 5)).astype('float32')
  expected = np.tensordot(y, u, 2)
  np.testing.assert_allclose(project(y, out, 'float32'), expected, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_product_of_zero_changes_no_bit(dtype):
  x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype('float32')
  matrix, _ = drawn_matrix((4, 5, 2), ('embed', 'kv_heads', None))
  fresh = matrix.adapter.replace(b=0 * matrix.adapter.b)
  found = project(x, matrix.replace(adapter=fresh), dtype)
  expected = project(x, matrix.replace(adapter=None), dtype)
  np.testing.assert_array_equal(found, expected)


def test_dropout_zeroes_a_share_of_the_inputs_and_keeps_their_mean():
  x = np.random.default_rng(1).normal(size=(40, 50, 8)).astype('float32')
  same = Adapter(jnp.eye(8), jnp.eye(8), 1.0, 1)  # gives its input back
  drops = [
    same.replace(dropout=0.25, key=jax.random.key(seed)) for seed in range(2)
  ]
  found, other = (np.asarray(adapter.beside(x)) for adapter in drops)
  np.testing.assert_array_equal(found, drops[0].beside(x))
  stays = found != 0
  np.testing.assert_allclose(found[stays], x[stays] / 0.75, rtol=1e-6)
  # Five standard deviations of a mean of as many choices.
  assert abs(stays.mean() - 0.75) < 5 * (0.25 * 0.75 / x.size) ** 0.5
  assert np.any(stays != (other != 0))
  never = same.replace(dropout=0.0, key=jax.random.key(0)).beside(x)
  np.testing.assert_array_equal(never, same.beside(x))


@pytest.mark.long
def test_adapters_drop_inputs_in_training_alone():
  """Each one that has inputs of its own draws its own numbers."""
  lora = dataclasses.replace(BASE.lora, dropout=0.25)
  params = boxed_parameters(BASE)
  assert jax.tree.structure(params) == jax.tree.structure(
    boxed_parameters(dataclasses.replace(BASE, lora=lora))
  )

  def draws(lora, deterministic):
    """How often a forward pass draws numbers."""
    model = Decoder(dataclasses.replace(BASE, lora=lora))
    arguments = {'deterministic': deterministic, 'rngs': {'dropout': KEY}}
    traced = jax.make_jaxpr(
      lambda params: model.apply({'params': params}, TOKENS, **arguments)
    )(meta.unbox(params))
    return len([*outputs(traced.jaxpr, 'random_bits')])

  assert draws(BASE.lora, deterministic=False) == 0
  assert draws(lora, deterministic=True) == 0
  assert draws(lora, deterministic=False) == 7 + 3 + 5 + 4


def outputs(jaxpr, primitive):
  """Shapes that an operation gives, those of inner programs among them."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == primitive:
      yield eqn.outvars[0].aval.shape
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from outputs(inner, primitive)


@pytest.mark.long
@pytest.mark.parametrize('remat', ['minimal', 'none'])
def test_a_frozen_matrix_gets_no_gradient(remat):
  """No product has the shape of a matrix, but of those that experts own."""
  config = dataclasses.replace(BASE, remat=remat, vocab=40)
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), meta.unbox(boxed_parameters(config))
  )
  tokens = np.zeros((3, 7), int)
  batch = {'tokens': tokens, 'targets': tokens, 'weights': np.ones((3, 7))}

  def shapes(kind):
    """Those of all products of a step that trains these parameters."""

    def loss(part):
      model, whole = Decoder(config), adapters.put(params, part)
      whole = whole if kind is adapters.alone else part
      return model.apply({'params': whole}, batch, method='loss').total

    traced = jax.make_jaxpr(jax.grad(loss))(kind(params))
    return {*outputs(traced.jaxpr, 'dot_general')}

  matrices = {(16, 32), (32, 16), (16, 24), (24, 16)}
  both = matrices | {shape[::-1] for shape in matrices}
  assert both & shapes(lambda params: params)
  assert not both & shapes(adapters.alone)


@pytest.mark.nightly
def test_gradients_are_those_of_the_sum(params):
  """The chain rule gives them from the gradient of a merged matrix."""
  batch = {'tokens': TOKENS, 'targets': TOKENS, 'weights': np.ones((2, 8))}
  plain, merged = adapters.merge(BASE, params)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(config, params):
    def loss(params):
      model = Decoder(config)
      return model.apply({'params': params}, batch, method='loss').total

    return jax.grad(loss)(params)

  found = traverse_util.flatten_dict(gradient(BASE, params), sep='/')
  whole = traverse_util.flatten_dict(gradient(plain, merged), sep='/')
  flat = traverse_util.flatten_dict(params, sep='/')
  for end, equation in EQUATIONS.items():
    (name,) = [x for x in whole if x.endswith(end) and 'shared/' not in x]
    into, total = equation.split('->')
    a, b = into.split(',')
    d = np.float64(whole[name])
    for side, wanted, other in (('a', a, b), ('b', b, a)):
      thin = flat[f'{name}_lora_{"b" if side == "a" else "a"}']
      expected = 1.5 * np.einsum(f'{total},{other}->{wanted}', d, thin)
      np.testing.assert_allclose(
        found[f'{name}_lora_{side}'], expected, atol=1e-5
      )


@pytest.mark.long
def test_decoding_merges_and_computes_the_same(params):
  config, apart = for_decoding(BASE, params)
  assert not config.lora.rank
  found = logits(config, apart)
  np.testing.assert_allclose(found, logits(BASE, params), atol=1e-4)


def test_the_scale_is_that_of_the_rank():
  assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
  assert LoraConfig(rank=16, alpha=32.0, rank_stabilized=True).scale == 8.0


def adapted(**changes):
  lora = dataclasses.replace(BASE.lora, **changes)
  return adapters.adapted(dataclasses.replace(BASE, lora=lora))


def test_adapters_are_where_patterns_ask_for_them():
  """Never on routers, norms, filters and the tables of the vocabulary."""
  ends = {path[1:] for path in adapted(matrices='*/attention,!*/value')}
  assert ends == {
    ('attention', name, 'kernel') for name in ('query', 'key', 'gate', 'out')
  }
  every = {'/'.join(path) for path in adapted()}
  assert len(every) == 7 + 3 + 5 + 3 + 4
  assert not any('router' in x or 'embed/' in x for x in every)
  boxed = traverse_util.flatten_dict(boxed_parameters(BASE), sep='/')
  assert {x.removesuffix('_lora_a') for x in boxed if '_lora_a' in x} == every


def test_adapters_are_counted_apart():
  count = accounting.parameters(BASE)
  plain = accounting.parameters(adapters.plain(BASE))
  assert count['adapters'] == count['total'] - plain['total']
  assert {**plain, 'adapters': 0}.keys() == count.keys()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'matrices': '*/gates'}, "'*/gates' matches no parameter; .* gate"),
    ({'matrices': '*/router'}, "'*/router' matches no parameter"),
    ({'matrices': ' ,*'}, 'none of them empty'),
    ({'rank': -1}, 'model.lora.rank=-1 must not be negative'),
    ({'rank': 0}, 'model.lora.rank=0 makes no adapters'),
    ({'alpha': 0.0}, 'model.lora.alpha=0.0 must be positive'),
    ({'dropout': 1.0}, r'model.lora.dropout=1.0 must lie in \[0, 1\)'),
    ({'dropout': -0.1}, r'model.lora.dropout=-0.1 must lie in \[0, 1\)'),
    (
      {'dropout': 0.1, 'matrices': '*/moe/up'},
      "dropout=0.1 does nothing: .*'*/moe/up' are of experts alone",
    ),
  ],
)
def test_what_makes_no_adapter_is_one_line(changes, message):
  with pytest.raises(ValueError, match=message.replace('*/', r'\*/')) as error:
    adapted(**changes)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('rank', 'train', 'message'),
  [
    (0, 'adapters', "train='adapters' and model.lora.rank=0, which makes none"),
    (2, 'all', "train='all' would train the base of model.lora.rank=2 too"),
  ],
)
def test_adapters_and_what_trains_have_to_agree(rank, train, message):
  lora = LoraConfig(rank=rank)
  with pytest.raises(ValueError, match=message):
    RunConfig(
      model=ModelConfig(lora=lora), optimizer=OptimizerConfig(train=train)
    )
