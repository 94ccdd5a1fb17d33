"""What every mixer of the table must hold, whatever it computes.

The checks take a pattern, so that a test which adds a mixer to the table can
run them on it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import Decoder
from gated_jax import ModelConfig
from gated_jax import init_cache
from gated_jax import sharding
from gated_jax.config import DeltaConfig
from gated_jax.config import MeshConfig
from gated_jax.model.mixers import MIXERS
from tests.quick import QUICK

LENGTH = 12
BASE = ModelConfig(
  vocab=32,
  length=16,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=4,
  mlp_width=16,
  dtype='float32',
  init_std=0.3,
  scan=False,
  delta=DeltaConfig(key_heads=2, value_heads=4, key_dim=4, value_dim=6),
)
# A layer of every mixer, and for each mixer what its words can say.
PATTERNS = [
  ('attention:window=3', 'attention:nope,heads=2,kv_heads=1'),
  *((word,) for word in MIXERS),
]


@functools.cache
def made(pattern):
  config = dataclasses.replace(BASE, pattern=pattern)
  model = Decoder(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    meta.unbox(shapes),
  )
  return model, params


def tokens_of(rows, length=LENGTH, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(0, BASE.vocab, (rows, length)).astype(np.int32)


@functools.cache
def compiled(model):
  return jax.jit(model.apply, compiler_options=QUICK)


def logits_of(pattern, tokens, **inputs):
  model, params = made(pattern)
  return compiled(model)({'params': params}, tokens, **inputs)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def check_causal(pattern):
  tokens = tokens_of(1)
  changed = tokens.copy()
  changed[:, 7:] = (changed[:, 7:] + 1) % BASE.vocab
  before, after = (logits_of(pattern, x) for x in (tokens, changed))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


def check_packed_equals_apart(pattern):
  tokens = tokens_of(1)
  for cut in (1, 5, 8, 11):
    segments = np.where(np.arange(LENGTH) < cut, 1, 2)[None]
    positions = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])[None]
    packed = logits_of(pattern, tokens, segments=segments, positions=positions)
    for begin, end in ((0, cut), (cut, LENGTH)):
      # Alone, at the beginning of a row whose rest is padding.
      apart = np.zeros_like(tokens)
      apart[:, : end - begin] = tokens[:, begin:end]
      valid = (np.arange(LENGTH) < end - begin)[None].astype(np.int32)
      found = logits_of(
        pattern, apart, segments=valid, positions=np.arange(LENGTH)[None]
      )
      close(packed[:, begin:end], found[:, : end - begin])


def check_steps_equal_the_whole(pattern):
  model, params = made(pattern)
  tokens = tokens_of(2)
  whole = logits_of(pattern, tokens)
  step = compiled(model)
  cache = init_cache(model.config, 2, 16)
  found = []
  for begin, end in ((0, 5), (5, 10), (10, 11), (11, 12)):
    part = tokens[:, begin:end]
    logits, cache = step({'params': params}, part, cache=cache)
    found.append(logits)
  close(np.concatenate(found, axis=1), whole)
  np.testing.assert_array_equal(cache.length, [12, 12])


def check_padding_leaves_the_state_alone(pattern):
  model, params = made(pattern)
  tokens = tokens_of(2)
  lengths = np.array([5, 8])
  step = compiled(model)
  # Both rows are padded to the longer one, and padding is anything.
  valid = (np.arange(8) < lengths[:, None]).astype(np.int32)
  _, cache = step(
    {'params': params},
    tokens[:, :8],
    segments=valid,
    cache=init_cache(model.config, 2, 16),
  )
  np.testing.assert_array_equal(cache.length, lengths)
  following = tokens_of(2, 1, seed=5)
  found, _ = step({'params': params}, following, cache=cache)
  for row, length in enumerate(lengths):
    text = np.concatenate([tokens[row, :length], following[row]])
    whole = np.zeros((1, LENGTH), np.int32)
    whole[0, : len(text)] = text
    close(found[row, 0], logits_of(pattern, whole)[0, length])


def check_sharded_equals_whole(pattern):
  model, params = made(pattern)
  tokens = tokens_of(4)
  expected = logits_of(pattern, tokens)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with sharding.activate(mesh):
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    placed = jax.device_put(params, sharding.shardings(mesh, boxed))
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    found = jax.jit(model.apply, compiler_options=QUICK)(
      {'params': placed}, rows
    )
  assert any(
    not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)
  )
  close(found, expected)


def check_flops_grow_with_the_layer(pattern):
  model, _ = made(pattern)
  for layer in model.config.layers:
    mixer = MIXERS[layer.mixer]
    short, long = (mixer.flops(model.config, layer, n) for n in (4, 16))
    assert 0 <= short <= long


CHECKS = (
  check_causal,
  check_packed_equals_apart,
  check_steps_equal_the_whole,
  check_padding_leaves_the_state_alone,
  pytest.param(check_sharded_equals_whole, marks=pytest.mark.long),
  check_flops_grow_with_the_layer,
)


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('pattern', PATTERNS, ids='+'.join)
def test_a_mixer(pattern, check):
  check(pattern)
