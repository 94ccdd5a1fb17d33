"""Runs saved before layers were words are read as what they were.

`saved_with_windows.json` holds the configs of three models as they were saved
then, the shapes of their parameters, and the loss that they had with the numbers
made below.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from gated_jax import Decoder
from gated_jax.config import from_dict
from gated_jax.config import to_dict
from gated_jax.config import upgrade
from gated_jax.model.abstract import boxed_parameters

SAVED = json.loads(
  pathlib.Path(__file__).with_name('saved_with_windows.json').read_text()
)
PATTERNS = {
  'windows': ('attention:window=3', 'attention:nope'),
  'experts': ('attention:window=4+moe',),
  'alone': ('attention', 'attention:window=3'),
}
TOKENS = np.arange(12)[None] % 31
BATCH = {
  'tokens': TOKENS,
  'targets': (TOKENS + 1) % 31,
  'segments': np.array([[1] * 5 + [2] * 7]),
  'positions': np.array([[*range(5), *range(7)]]),
  'weights': np.ones((1, 12), np.float32),
}


def numbers(name, shape):
  flat = np.cos(np.arange(np.prod(shape)) * 0.37 + len(name))
  return flat.reshape(shape).astype(np.float32) * 0.5


@pytest.mark.parametrize('name', SAVED)
def test_an_old_config_is_the_same_model_with_the_same_tree(name):
  saved = SAVED[name]
  config = from_dict(upgrade(saved['config'] | {'data': {'length': 16}})).model
  assert config.pattern == PATTERNS[name]
  shapes = traverse_util.flatten_dict(
    meta.unbox(boxed_parameters(config)), sep='/'
  )
  assert {k: list(v.shape) for k, v in shapes.items()} == saved['tree']
  params = traverse_util.unflatten_dict(
    {k: numbers(k, shape) for k, shape in saved['tree'].items()}, sep='/'
  )
  loss = jax.jit(
    lambda p: Decoder(config).apply(
      {'params': p}, BATCH, method='loss', deterministic=True
    )
  )(jax.tree.map(jnp.asarray, params))
  np.testing.assert_allclose(loss.nll, saved['nll'], rtol=1e-6)


def test_a_config_of_today_comes_back_unchanged():
  values = to_dict(from_dict({'seed': 3}))
  assert upgrade(values) == values
