"""Where norms stand, and what they are over."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import ModelConfig
from gated_jax.config import DeltaConfig
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.block import Block
from gated_jax.model.mixer import Context
from gated_jax.ops.rope import rotation

SMALL = ModelConfig(
  vocab=31,
  length=16,
  depth=2,
  pattern=('attention', 'attention:norm=post'),
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=4,
  mlp_width=24,
  norm_eps=1e-12,
  dtype='float32',
  scan=False,
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 8))


def random_parameters(config):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
    meta.unbox(boxed_parameters(config)),
  )


# A program of this size takes longer to optimise than to run.
compiled = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


def logits_of(config):
  run = compiled(Decoder(config).apply)
  return lambda params: np.asarray(run({'params': params}, TOKENS))


def times(params, path, factor):
  """The parameters, those at one path multiplied."""

  def scaled(at, x):
    return x * factor if jax.tree_util.keystr(at).endswith(path) else x

  return jax.tree_util.tree_map_with_path(scaled, params)


def test_a_norm_after_a_block_takes_the_size_of_its_output_away():
  params, run = random_parameters(SMALL), logits_of(SMALL)
  expected = run(params)
  for layer, same in (('layers_0', False), ('layers_1', True)):
    for block, kernel in (('attention', 'out'), ('mlp', 'down')):
      path = f"['{layer}']['{block}']['{kernel}']['kernel']"
      changed = run(times(params, path, 5.0))
      assert np.allclose(changed, expected, atol=1e-4) == same


def test_a_layer_with_norms_after_its_blocks_has_none_before_them():
  params = random_parameters(SMALL)
  names = [
    {name for name in params[layer] if 'norm' in name}
    for layer in ('layers_0', 'layers_1')
  ]
  assert names == [
    {'attention_norm', 'mlp_norm'},
    {'attention_post_norm', 'mlp_post_norm'},
  ]
  alone = dataclasses.replace(SMALL, norm='post', pattern=('attention',))
  said = dataclasses.replace(SMALL, pattern=('attention:norm=post',))
  assert alone.layers[0].norm == ''
  shapes = jax.tree.map(np.shape, random_parameters(alone))
  assert shapes == jax.tree.map(np.shape, random_parameters(said))


FORMS = dataclasses.replace(
  SMALL, pattern=('attention',), depth=1, norm='sandwich'
)


def test_a_scale_before_the_norm_only_turns_and_none_has_no_parameter():
  plain = random_parameters(FORMS)
  config = dataclasses.replace(
    FORMS, mixer_post_scale='none', ffn_post_scale='before'
  )
  params, run = random_parameters(config), logits_of(config)
  assert 'attention_post_norm' not in params['layers_0']
  scale = "['mlp_post_norm']['scale']"
  expected = run(params)
  assert np.allclose(run(times(params, scale, 3.0)), expected, atol=1e-4)
  one = np.ones(16, np.float32)
  one[3] = 4.0
  assert not np.allclose(run(times(params, scale, one)), expected, atol=1e-2)
  # A scale of ones is the same in all three places.
  ones = jax.tree_util.tree_map_with_path(
    lambda at, x: x**0 if 'post_norm' in jax.tree_util.keystr(at) else x, plain
  )
  del (bare := dict(ones['layers_0']))['attention_post_norm']
  np.testing.assert_allclose(
    logits_of(FORMS)(ones), run({**ones, 'layers_0': bare}), atol=1e-4
  )


def test_a_norm_of_heads_takes_the_size_of_values_but_not_of_gates_away():
  config = dataclasses.replace(FORMS, norm='pre', head_norm=True)
  params, run = random_parameters(config), logits_of(config)
  expected = run(params)
  for name, same in (('value', True), ('gate', False), ('out', False)):
    changed = run(times(params, f"['{name}']['kernel']", 3.0))
    assert np.allclose(changed, expected, atol=1e-3) == same, name


def test_shares_of_the_stream_are_those_of_their_formula():
  config = dataclasses.replace(
    FORMS, residual='gated', residual_temperature=0.5
  )
  layer = random_parameters(config)['layers_0']
  layer['mlp_shares']['logits'] = np.linspace(-3, 3, 16, dtype=np.float32)
  block = Block(config, config.layers[0])
  x = np.random.default_rng(2).normal(size=(1, 8, 16)).astype(np.float32)

  @compiled
  def run(logits):
    params = layer | {'mlp_shares': {'logits': logits}}
    turns = (rotation(jnp.arange(8)[None], 4, config.rope),)
    return block.apply({'params': params}, x, None, Context(rotations=turns))[0]

  def stream(logits):
    return np.asarray(run(logits.astype(np.float32)), np.float64)

  # Nothing of the output is in it; nearly the output alone.
  before = stream(np.full(16, -100.0))
  least = 1e-3**0.5
  output = stream(np.full(16, 100.0)) - least * before
  b = 1 / (1 + np.exp(-layer['mlp_shares']['logits'] / 0.5))
  a = np.sqrt(np.maximum(1 - np.float64(b) ** 2, 1e-3))
  found = stream(layer['mlp_shares']['logits'])
  np.testing.assert_allclose(found, a * before + b * output, atol=1e-4)


@pytest.mark.parametrize(
  'joint', [True, pytest.param(False, marks=pytest.mark.long)]
)
def test_a_norm_of_all_heads_keeps_their_sizes_apart(joint):
  config = dataclasses.replace(SMALL, qk_norm_joint=joint)
  params, run = random_parameters(config), logits_of(config)
  expected = run(params)
  for name, heads in (('query', config.heads), ('key', config.kv_heads)):
    size = params['layers_1']['attention'][f'{name}_norm']['scale'].shape
    assert size == ((heads * 4,) if joint else (4,))
    one = np.ones((heads, 1), np.float32)
    one[0] = 3.0
    path = f"['layers_1']['attention']['{name}']['kernel']"
    for factor, same in ((3.0, True), (one, not joint)):
      found = run(times(params, path, factor))
      assert np.allclose(found, expected, atol=1e-4) == same


def test_a_doubled_share_of_correction_is_twice_the_sigmoid():
  def share(doubled):
    config = dataclasses.replace(
      SMALL,
      pattern=('gated_deltanet', 'attention'),
      delta=DeltaConfig(2, 2, 4, 4, doubled_beta=doubled),
    )

    @compiled
    def probe(params):
      variables = {'params': params}
      _, found = Decoder(config).apply(variables, TOKENS, mutable='probes')
      return found['probes']['layers_0']['gated_deltanet']['delta_beta'][0]

    return float(probe(random_parameters(config)))

  np.testing.assert_allclose(share(True), 2 * share(False), rtol=1e-6)
