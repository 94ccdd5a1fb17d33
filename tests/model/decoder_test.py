"""The whole model: what a token can see, how layers are stacked, the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import GateConfig
from gated_jax import ModelConfig
from gated_jax import sharding
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.model.block import SAVED
from tests.quick import QUICK

SMALL = ModelConfig(
  vocab=61,
  length=32,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=24,
  dtype='float32',
  init_std=0.2,
)
ROWS = {
  'segments': np.array([[1, 1, 1, 1, 2, 2, 2, 0]]),
  'positions': np.array([[0, 1, 2, 3, 0, 1, 2, 0]]),
  'weights': np.array([[1, 1, 1, 0, 1, 1, 0, 0]], np.float32),
}
# Who sees whom: causality, and no document but one's own.
VISIBLE = np.array(
  [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
  ]
)
VARIANTS = {
  'plain': {},
  'ungated': {'gate': GateConfig(position='none')},
  'headwise': {'gate': GateConfig(granularity='headwise')},
  'value': {'gate': GateConfig(position='value')},
  'key': {'gate': GateConfig(position='key')},
  'query': {'gate': GateConfig(position='query')},
  'dense_output': {'gate': GateConfig(position='dense_output')},
  'sink_logit': {'gate': GateConfig(kind='sink_logit')},
  'key_bias': {'gate': GateConfig(kind='key_bias')},
  'rms_norm_of_heads': {'gate': GateConfig(kind='rms_norm')},
  'untied': {'tie_embeddings': False},
  'no_qk_norm': {'qk_norm': False},
  'sandwich': {'norm': 'sandwich', 'norm_zero_centered': True},
  'pattern': {
    'pattern': ('attention:window=3', 'attention:nope'),
    'depth': 4,
  },
  'experts': {
    'pattern': ('attention+moe',),
    'moe': MoEConfig(experts=4, top_k=2, width=8, shared_width=8),
  },
  'yarn': {
    'rope': RopeConfig(scaling='yarn', factor=4.0, original_length=8),
  },
  'scaled': {
    'embed_norm': True,
    'output_scale': 0.5,
    'logit_softcap': 5.0,
    'norm': 'sandwich',
    'norm_zero_centered': True,
    'post_norm_eps': 1e-3,
    'final_norm_plain': True,
    'qk_norm_scale': False,
    'query_scale': 3.0,
  },
  'biases': {
    'qkv_bias': True,
    'out_bias': True,
    'gate': GateConfig(granularity='headwise', bias=True),
  },
  'mixed': {
    'depth': 3,
    'lead': ('attention+mlp:limit=0.5',),
    'pattern': (
      'attention:heads=2,window=3,rope_scaling=none,rope_base=100'
      '+moe:limit=0.5,shared_limit=0.3',
      'attention+moe',
    ),
    'gate': GateConfig(granularity='headwise', activation='softplus'),
    'rope': RopeConfig(scaling='llama3', factor=4.0, original_length=8),
    'moe': MoEConfig(
      experts=4, top_k=2, width=8, shared_width=8, score='sigmoid', softcap=1.0
    ),
  },
}


def config_of(name, **more):
  return dataclasses.replace(SMALL, **VARIANTS[name], **more)


def make(config):
  """A model and parameters of no structure, for compiling init is slow."""
  model = Decoder(config)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  rng = np.random.default_rng(0)

  def draw(path, x):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return jnp.asarray(rng.normal(mean, config.init_std, x.shape), x.dtype)

  params = meta.unbox(shapes)['params']
  return model, jax.tree_util.tree_map_with_path(draw, params)


def batch_of(seed=0, rows=1):
  tokens = np.random.default_rng(seed).integers(0, 61, (rows, 9))
  repeated = {k: np.repeat(v, rows, axis=0) for k, v in ROWS.items()}
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], **repeated}


def loss_of(model, params, batch):
  run = jax.jit(
    lambda p, b: model.apply({'params': p}, b, method='loss'),
    compiler_options=QUICK,
  )
  return run(params, batch)


def test_a_row_without_document_numbers_is_one_document():
  model, params = make(SMALL)
  batch = batch_of(rows=2)
  named = {
    'segments': np.ones((2, 8), np.int32),
    'positions': np.tile(np.arange(8, dtype=np.int32), (2, 1)),
  }
  bare = {k: v for k, v in batch.items() if k not in named}
  expected = loss_of(model, params, batch | named)
  np.testing.assert_allclose(
    loss_of(model, params, bare).total, expected.total, rtol=1e-6
  )


@pytest.mark.long
@pytest.mark.parametrize('name', VARIANTS)
def test_a_token_sees_its_own_document_up_to_itself(name):
  config = config_of(name)
  model, params = make(config)
  batch = batch_of()
  table = params['embed']['embedding']
  inputs = table[batch['tokens'][0]]

  # Each token gets a row of its own, so that its gradient is known apart.
  def logits_of(rows):
    own = {**params, 'embed': {'embedding': table.at[:8].set(rows)}}
    found = model.apply(
      {'params': own},
      jnp.arange(8)[None],
      segments=batch['segments'],
      positions=batch['positions'],
    )
    # Tied logits depend on every row: look at one that is no input.
    return found[0, :, 20]

  @jax.jit
  def jacobian_of(rows):
    # Row by row: grouped matmuls cannot be batched over this axis.
    found, pullback = jax.vjp(logits_of, rows)
    return jax.lax.map(lambda e: pullback(e)[0], jnp.eye(len(found)))

  jacobian = jacobian_of(inputs)
  seen = (np.abs(jacobian).sum(-1) > 0).astype(int)
  np.testing.assert_array_equal(seen, VISIBLE)


@pytest.mark.parametrize('name', VARIANTS)
def test_every_parameter_is_float32_and_names_its_axes(name):
  config = dataclasses.replace(config_of(name), dtype='bfloat16')
  model, tokens = Decoder(config), jnp.zeros((1, 8), jnp.int32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  for box in jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, 'names')):
    assert box.value.dtype == jnp.float32
    assert len(box.names) == box.value.ndim
    assert set(box.names) <= {*sharding.RULES, None}
    # Only what is small for good is nowhere split.
    assert box.value.ndim < 2 or any(box.names)


@pytest.mark.parametrize('name', ('plain', 'experts'))
def test_activations_are_bfloat16_and_logits_float32(name):
  config = dataclasses.replace(config_of(name), dtype='bfloat16', scan=False)
  model, params = make(config)
  logits, sown = jax.eval_shape(
    lambda p: model.apply(
      {'params': p},
      jnp.zeros((1, 8), jnp.int32),
      capture_intermediates=True,
      mutable=['intermediates'],
    ),
    params,
  )
  assert logits.dtype == jnp.float32
  value = jax.tree_util.GetAttrKey('value')
  kinds = {
    jax.tree_util.keystr(path): x.dtype
    for path, x in jax.tree_util.tree_leaves_with_path(sown)
    # A module that owns a matrix gives the matrix, as it is stored.
    if x.ndim == 3 and x.shape[-1] == config.width and path[-1] != value
  }
  assert len(kinds) > 2 * config.depth
  assert set(kinds.values()) == {jnp.dtype('bfloat16')}, kinds


def test_a_window_hides_what_is_farther_back():
  model, params = make(
    dataclasses.replace(SMALL, pattern=('attention:window=3',), depth=1)
  )
  table = params['embed']['embedding']

  def logits_of(rows):
    own = {**params, 'embed': {'embedding': table.at[:6].set(rows)}}
    return model.apply({'params': own}, jnp.arange(6)[None])[0, :, 20]

  seen = np.abs(jax.jit(jax.jacrev(logits_of))(table[:6])).sum(-1) > 0
  np.testing.assert_array_equal(
    seen.astype(int), np.tri(6, dtype=int) - np.tri(6, k=-3, dtype=int)
  )


@pytest.mark.parametrize(
  'name',
  ['plain', 'pattern', pytest.param('experts', marks=pytest.mark.long)],
)
def test_scanned_layers_are_the_unscanned_ones(name):
  config = config_of(name)
  model, params = make(config)
  batch = batch_of(rows=2)
  loss = loss_of(model, params, batch)
  pattern = len(config.pattern)
  flat = {k: v for k, v in params.items() if k != 'layers'}
  for layer in range(config.depth):
    tree = params['layers']
    if pattern > 1:
      tree = tree[f'block_{layer % pattern}']
    flat[f'layers_{layer}'] = jax.tree.map(
      lambda x, layer=layer: x[layer // pattern], tree
    )
  alone = Decoder(dataclasses.replace(config, scan=False))
  found = loss_of(alone, flat, batch)
  np.testing.assert_allclose(found.total, loss.total, rtol=1e-6)
  assert found.metrics.keys() == loss.metrics.keys()


@pytest.mark.long
@pytest.mark.parametrize('policy', SAVED)
def test_remat_changes_nothing_but_memory(policy):
  config = config_of('plain')
  _, params = make(config)
  batch = batch_of()

  def gradient(remat):
    other = Decoder(dataclasses.replace(config, remat=remat))

    def total(p):
      return other.apply({'params': p}, batch, method='loss').total

    return jax.jit(jax.grad(total), compiler_options=QUICK)(params)

  def compare(a, b):
    # Sums in another order: a few roundings of the largest terms.
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(a, b, rtol=0, atol=32 * eps * np.abs(b).max())

  jax.tree.map(compare, gradient(policy), gradient('none'))


def test_policies_save_less_and_less():
  config = dataclasses.replace(config_of('plain'), depth=4)

  def saved(remat):
    model = Decoder(dataclasses.replace(config, remat=remat))
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = meta.unbox(shapes)['params']

    def total(p):
      return model.apply({'params': p}, batch_of(), method='loss').total

    _, pullback = jax.eval_shape(lambda p: jax.vjp(total, p), params)
    return sum(x.size for x in jax.tree.leaves(pullback))

  sizes = [saved(r) for r in ('none', 'minimal', 'attention', 'full')]
  assert sizes == sorted(set(sizes), reverse=True), sizes


@pytest.mark.parametrize('tied', (True, False))
def test_loss_is_the_mean_over_the_tokens_that_count(tied):
  """In float64 NumPy, from the logits; z-loss too."""
  config = dataclasses.replace(
    SMALL, tie_embeddings=tied, z_loss=0.3, logit_chunk=5
  )
  model, params = make(config)
  batch = batch_of(rows=3)
  logits = jax.jit(model.apply)(
    {'params': params},
    batch['tokens'],
    segments=batch['segments'],
    positions=batch['positions'],
  )
  logits = np.asarray(logits, np.float64)
  lse = np.log(np.exp(logits).sum(-1))
  at = np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
  weights = batch['weights'] / batch['weights'].sum()
  nll, z = ((lse - at) * weights).sum(), (lse**2 * weights).sum()
  found = loss_of(model, params, batch)
  np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
  np.testing.assert_allclose(found.total, nll + 0.3 * z, rtol=1e-5)
  assert found.weight == batch['weights'].sum()


def test_no_array_of_a_large_vocabulary_holds_the_batch():
  config = dataclasses.replace(SMALL, vocab=151_936, logit_chunk=256)
  model = Decoder(config)
  rows = {
    name: jax.ShapeDtypeStruct((4, 1024), kind)
    for name, kind in (
      ('tokens', 'int32'),
      ('targets', 'int32'),
      ('segments', 'int32'),
      ('positions', 'int32'),
      ('weights', 'float32'),
    )
  }
  params = jax.eval_shape(model.init, jax.random.key(0), rows['tokens'])
  params = meta.unbox(params)['params']

  def total(p, batch):
    return model.apply({'params': p}, batch, method='loss').total

  text = str(jax.make_jaxpr(jax.grad(total))(params, rows))
  assert 'f32[256,151936]' in text
  assert '4096,151936' not in text
  assert '1024,151936' not in text


@pytest.mark.long
def test_the_first_step_is_the_one_it_always_was():
  """Guards against silent changes of initialisation or arithmetic."""
  model = Decoder(config_of('plain'))
  tokens = jnp.zeros((1, 8), jnp.int32)
  init = jax.jit(model.init, compiler_options=QUICK)
  params = meta.unbox(init(jax.random.key(7), tokens))['params']
  batch = batch_of(7)

  def total(p):
    return model.apply({'params': p}, batch, method='loss').total

  step = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)
  loss, gradient = step(params)
  norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
  gate = np.linalg.norm(gradient['layers']['attention']['gate']['kernel'])
  np.testing.assert_allclose(
    [loss, norm, gate], [4.356481, 7.366482, 0.972148], rtol=1e-5
  )
