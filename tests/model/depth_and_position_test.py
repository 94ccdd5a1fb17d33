"""Settings by which a layer's number or a token's position scales something."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import GateConfig
from gated_jax import ModelConfig
from gated_jax.model import tree
from gated_jax.model.abstract import boxed_parameters

SMALL = ModelConfig(
  vocab=31,
  length=16,
  depth=5,
  lead=('attention',),
  pattern=('attention:nope', 'attention:window=3'),
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=4,
  mlp_width=24,
  dtype='float32',
  init_std=0.5,
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 8))


def random_parameters(config):
  rng = np.random.default_rng(1)
  shapes = meta.unbox(boxed_parameters(config))
  return jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes
  )


def logits_of(config, params, positions=None):
  # A program of this size takes longer to optimise than to run.
  run = jax.jit(
    Decoder(config).apply,
    compiler_options={
      'xla_backend_optimization_level': 0,
      'xla_llvm_disable_expensive_passes': True,
    },
  )
  return run({'params': params}, TOKENS, positions=positions)


@pytest.mark.long
@pytest.mark.parametrize('scan', [True, False])
def test_a_stream_scaled_by_depth_is_a_sum_of_equal_shares(scan):
  # Norms read it, which take a common factor away but for their eps: with
  # another number of terms anywhere, shares would differ and logits with them.
  scanned = dataclasses.replace(SMALL, norm_eps=1e-12)
  params = random_parameters(scanned)
  plain = dataclasses.replace(scanned, scan=scan)
  params = params if scan else tree.unstack(scanned, params)
  scaled = dataclasses.replace(plain, residual='depth_scaled')
  expected, found = (logits_of(config, params) for config in (plain, scaled))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_queries_grow_with_their_positions_where_nothing_turns_them():
  alone = dataclasses.replace(
    SMALL, depth=1, lead=(), pattern=('attention:nope',)
  )
  params = random_parameters(alone)
  grows = dataclasses.replace(alone, query_growth=0.7, query_growth_length=4)
  positions = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]])
  found = logits_of(grows, params, positions=positions)
  for position in (2, 7):
    factor = (1 + (position + 1) / 4) ** 0.7
    fixed = dataclasses.replace(alone, query_scale=factor)
    at = positions == position
    expected = logits_of(fixed, params, positions=positions)[at]
    np.testing.assert_allclose(found[at], expected, rtol=1e-4, atol=1e-5)


def test_layers_that_turn_queries_do_not_let_them_grow():
  params = random_parameters(SMALL)
  more = dataclasses.replace(SMALL, query_growth=0.7, query_growth_length=1)
  # The layers without rotation put out nothing.
  kernel = params['layers']['block_0']['attention']['out']['kernel']
  params['layers']['block_0']['attention']['out']['kernel'] = 0 * kernel
  np.testing.assert_array_equal(
    logits_of(more, params), logits_of(SMALL, params)
  )


def test_a_bias_by_head_is_the_same_number_for_all_channels_of_a_head():
  def with_bias(**changes):
    gate = GateConfig(bias=True, **changes)
    return dataclasses.replace(SMALL, depth=3, gate=gate)

  by_head = with_bias(bias_by_head=True)
  params = random_parameters(by_head)

  def widened(path, x):
    if path[-2:] != (
      jax.tree_util.DictKey('gate'),
      jax.tree_util.DictKey('bias'),
    ):
      return x
    return jnp.repeat(x[..., None], 4, axis=-1)

  wide = jax.tree_util.tree_map_with_path(widened, params)
  np.testing.assert_array_equal(
    logits_of(by_head, params), logits_of(with_bias(), wide)
  )
