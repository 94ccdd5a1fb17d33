"""Where norms stand, and what they are over."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import ModelConfig
from gated_jax.config import DeltaConfig
from gated_jax.model.abstract import boxed_parameters

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
