"""Random parameters, made without compiling anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax.model.decoder import Decoder


@pytest.fixture(scope='session')
def make_params():
  """A function from a model's config to NumPy parameters."""

  def make(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
      center = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
      return rng.normal(center, config.init_std, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, meta.unbox(shapes['params']))

  return make
