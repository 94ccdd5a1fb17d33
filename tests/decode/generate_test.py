"""Decoding is teacher forcing, cut into steps."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.decode import Sampling
from gated_jax.decode import for_decoding
from gated_jax.decode import generate
from gated_jax.decode.generate import _extend
from gated_jax.decode.generate import _step
from gated_jax.decode.generate import buckets
from gated_jax.decode.generate import prefill
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder
from gated_jax.ops.attention import decode as attention
from gated_jax.ops.attention.api import gated_dot_product_attention

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

BASE = ModelConfig(
  vocab=61,
  length=64,
  depth=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=24,
  dtype='float32',
  init_std=0.3,
)
YARN = RopeConfig(scaling='yarn', factor=4.0, original_length=16)
# What differs from BASE. Every value of an axis stands in some row.
CASES = {
  'no gate': {'gate': GateConfig(position='none'), 'kv_heads': 4},
  'query': {
    'gate': GateConfig(position='query'),
    'pattern': ('attention:window=5',),
  },
  'key': {'gate': GateConfig(position='key'), 'kv_heads': 1},
  'value headwise': {
    'gate': GateConfig(position='value', granularity='headwise'),
    'scan': False,
  },
  'output elementwise': {'rope': YARN, 'norm': 'sandwich'},
  'output headwise': {
    'gate': GateConfig(granularity='headwise'),
    'pattern': ('attention:window=6', 'attention:nope'),
    'kv_heads': 4,
  },
  'output shared': {
    'gate': GateConfig(shared=True),
    'pattern': ('attention', 'attention:window=3'),
    'tie_embeddings': False,
  },
  'output additive': {'gate': GateConfig(mode='additive', activation='silu')},
  'dense output': {'gate': GateConfig(position='dense_output'), 'rope': YARN},
  'experts': {
    'pattern': ('attention+moe',),
    'moe': MoEConfig(experts=4, top_k=2, width=8, shared_width=8),
  },
  'query headwise': {
    'gate': GateConfig(position='query', granularity='headwise'),
    'qk_norm': False,
  },
}


@functools.cache
def built(config):
  """Random parameters, made without compiling anything."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    center = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return rng.normal(center, config.init_std, leaf.shape).astype(leaf.dtype)

  shapes = meta.unbox(shapes['params'])
  return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens_of(shape, seed=0):
  return np.random.default_rng(seed).integers(0, BASE.vocab, shape, np.int32)


@pytest.mark.parametrize('name', CASES)
def test_decoding_is_teacher_forcing_token_by_token(name):
  config = dataclasses.replace(BASE, **CASES[name])
  params = built(config)
  length, lengths = 22, np.array([3, 13, 10])
  tokens = tokens_of((3, length))
  whole = jax.jit(Decoder(config).apply)({'params': params}, tokens)

  config, params = for_decoding(config, params)
  model = Decoder(config)
  call = jax.jit(functools.partial(model.apply, {'params': params}))
  cache = init_cache(config, 3, 32)
  chunk, before = 8, np.zeros((3, config.vocab), np.float32)
  for start in (0, chunk):
    places = np.arange(start, start + chunk)
    segments = (places < lengths[:, None]).astype(np.int32)
    given = np.where(segments, tokens[:, places], 7)
    before, cache = _extend(model, params, cache, before, given, segments)
  rows = np.arange(3)
  error = np.abs(before - whole[rows, lengths - 1]).max()
  for i in range(length - lengths.max()):
    at = lengths + i
    logits, cache = call(tokens[rows, at][:, None], cache=cache)
    error = max(error, np.abs(logits[:, 0] - whole[rows, at]).max())
  np.testing.assert_array_equal(cache.length, at + 1)
  # A logit is a sum of some hundred products, after two layers of such sums.
  assert error < 64 * np.finfo(np.float32).eps * np.abs(whole).max()
  assert np.ptp(whole) > 1  # the model says something


def greedy(config, params, prompt, count):
  """Without a cache, padding or batch: one long sequence at a time."""
  ids = list(prompt)
  apply = jax.jit(Decoder(config).apply)
  for _ in range(count):
    row = np.zeros((1, config.length), np.int32)
    row[0, : len(ids)] = ids
    logits = apply({'params': params}, row)
    ids.append(int(np.argmax(logits[0, len(ids) - 1])))
  return ids[len(prompt) :]


def test_prompts_of_different_lengths_go_on_as_each_would_alone():
  prompts = [tokens_of(n, seed=n) for n in (1, 40, 33)]
  ready, params = for_decoding(BASE, built(BASE))
  found = np.stack(list(generate(Decoder(ready), params, prompts)), axis=1)
  # The model's length ends each row in turn; -1 follows.
  assert found.shape[1] == BASE.length
  for prompt, row in zip(prompts, found, strict=True):
    count = BASE.length - len(prompt) + 1
    assert list(row[:count]) == greedy(BASE, built(BASE), prompt, count)
    assert set(row[count:]) <= {-1}


def test_a_mesh_gives_the_same_tokens():
  prompts = [tokens_of(n, seed=n) for n in (3, 9)]
  config = dataclasses.replace(BASE, vocab=64, scan=False)
  params = built(config)
  model = Decoder(config)
  call = functools.partial(generate, max_tokens=6)
  alone = list(call(model, params, prompts))
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
  boxed = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  with sharding.activate(mesh):
    placed = jax.device_put(params, sharding.shardings(mesh, boxed['params']))
    split = list(call(model, placed, prompts))
  np.testing.assert_array_equal(alone, split)


def test_a_prompt_of_many_chunks_fills_the_cache_as_one_does(monkeypatch):
  config, params = for_decoding(BASE, built(BASE))
  prompts = [tokens_of(n, seed=n) for n in (50, 3, 32)]
  once, _ = prefill(Decoder(config), params, prompts, 4)
  # The package's name for it is the function.
  module = importlib.import_module('gated_jax.decode.generate')
  monkeypatch.setattr(module, 'CHUNK', 16)
  monkeypatch.setattr(module, 'SMALLEST', 16)
  assert buckets(50, 4).chunks == 4
  parts, cache = prefill(Decoder(config), params, prompts, 4)
  np.testing.assert_allclose(once, parts, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(cache.length, [50, 3, 32])


def test_there_is_one_compilation_for_a_bucket_of_shapes():
  config, params = for_decoding(BASE, built(BASE))
  call = functools.partial(generate, Decoder(config), params, max_tokens=3)
  list(call([tokens_of(4), tokens_of(5)]))
  before = _extend._cache_size(), _step._cache_size()
  for lengths in ((1, 1), (29, 2), (17, 30)):
    list(call([tokens_of(n) for n in lengths]))
  assert (_extend._cache_size(), _step._cache_size()) == before


def test_buckets_hold_what_they_are_for():
  for longest in (1, 31, 32, 33, 255, 257, 1000, 5000):
    for new in (1, 2, 300):
      b = buckets(longest, new)
      assert b.chunk * b.chunks >= longest
      assert b.cache >= max(longest + new - 1, b.chunk * b.chunks)
      assert b.cache <= 1.3 * max(longest + new, b.chunk * b.chunks, 1024)


def test_stop_tokens_end_rows_one_by_one():
  config, params = for_decoding(BASE, built(BASE))
  call = functools.partial(generate, Decoder(config), params)
  prompts = [tokens_of(4, 1), tokens_of(6, 2)]
  sampling = Sampling(temperature=1.5)
  free = np.stack(list(call(prompts, max_tokens=12, sampling=sampling)), 1)
  stop = int(free[0, 2])
  first = [list(row).index(stop) if stop in row else 11 for row in free]
  ended = np.stack(
    list(call(prompts, max_tokens=12, sampling=sampling, stop={stop})), 1
  )
  assert ended.shape[1] == max(first) + 1
  for row, whole, last in zip(ended, free, first, strict=True):
    np.testing.assert_array_equal(row[: last + 1], whole[: last + 1])
    assert set(row[last + 1 :]) <= {-1}


def test_a_seed_reproduces_and_another_does_not():
  config, params = for_decoding(BASE, built(BASE))
  same = tokens_of(4, 1)
  call = functools.partial(
    generate, Decoder(config), params, [same, same], max_tokens=16
  )
  draw = functools.partial(call, sampling=Sampling(temperature=2.0))
  first = np.stack(list(draw(seed=3)), 1)
  np.testing.assert_array_equal(first, np.stack(list(draw(seed=3)), 1))
  assert (first != np.stack(list(draw(seed=4)), 1)).any()
  assert (first[0] != first[1]).any()  # two rows are two draws


WRONG = [
  ([], {}, 'there are no prompts'),
  ([[1], []], {}, 'prompt 1 is empty'),
  ([[1] * 65], {}, 'prompt 0 has 65 tokens, and the model is built for 64'),
  ([[1, 61]], {}, 'token id 61, which is not in'),
  ([[-1]], {}, 'token id -1'),
  ([[0.5]], {}, 'must be a list of token ids'),
  ([[1]], {'max_tokens': 0}, 'max_tokens=0'),
  ([[1]], {'seed': -1}, 'seed=-1'),
  ([[1]], {'stop': {61}}, r'stop token 61 is not in \[0, 61\)'),
  ([[1]], {'stop': {-5}}, 'stop token -5'),
  ([[1]], {'skip_below': float('nan')}, 'skip_below=nan'),
  ([[1]], {'skip_below': 1.0}, r'skip_below=1\.0 would skip every head'),
  ([[1]], {'skip_below': -0.1}, 'skip_below=-0.1'),
]


@pytest.mark.parametrize(('prompts', 'options', 'message'), WRONG)
def test_what_cannot_be_read_is_named_at_once(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    generate(Decoder(BASE), built(BASE), prompts, **options)


@pytest.mark.parametrize('granularity', ['headwise', 'elementwise'])
def test_a_threshold_of_zero_is_exact_and_steps_skip_as_one_call(granularity):
  config = dataclasses.replace(
    BASE, gate=GateConfig(granularity=granularity, init_std=0.5)
  )
  config, params = for_decoding(config, built(config))
  model = Decoder(config)
  call = jax.jit(functools.partial(model.apply, {'params': params}))
  tokens = tokens_of((2, 9))
  exact = call(tokens)
  np.testing.assert_array_equal(exact, call(tokens, skip_below=jnp.float32(0)))
  # About half of the heads of one channel a head, fewer of eight.
  threshold = jnp.float32(0.6 if granularity == 'headwise' else 0.97)
  whole = call(tokens, skip_below=threshold)
  assert np.abs(whole - exact).max() > 1e-3
  cache, parts = init_cache(config, 2, 32), []
  for t in range(tokens.shape[1]):
    logits, cache = call(
      tokens[:, t : t + 1], cache=cache, skip_below=threshold
    )
    parts.append(logits[:, 0])
  np.testing.assert_allclose(np.stack(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('channels', [1, 8])
@pytest.mark.parametrize('threshold', [0.0, 0.05, 0.3, 0.9])
def test_what_leaving_heads_out_changes_is_bounded(channels, threshold):
  rng = np.random.default_rng(channels)
  query, key, value = (
    jnp.asarray(rng.normal(size=(3, 5, heads, 8)), jnp.float32)
    for heads in (4, 2, 2)
  )
  # Scores from shut to open, and one head's just below the threshold on a
  # value that is the same for all keys: there the bound is met.
  gate = rng.normal(-1, 3, (3, 5, 4, channels)).astype(np.float32)
  if threshold:
    shut = threshold * (1 - 1e-5)
    gate[0, :, :2] = np.log(shut / (1 - shut))
    value = value.at[0, :, 0].set(10.0)
  output = gated_dot_product_attention(query, key, value, gate).output
  silent = attention.skipped_heads(
    jax.nn.sigmoid(gate), 2, jnp.float32(threshold)
  )
  changed = np.abs(output - attention.zero_skipped(output, silent))
  worst = changed.reshape(3, 5, 2, -1).max((0, 1, 3))
  bound = attention.error_bound(value, jnp.float32(threshold))
  assert (worst <= bound).all()
  assert np.any(silent) == bool(threshold)
  np.testing.assert_allclose(worst[0], bound[0], rtol=1e-4)


@pytest.mark.parametrize(
  'gate',
  [
    GateConfig(position='none'),
    GateConfig(position='value'),
    GateConfig(mode='additive'),
    GateConfig(kind='silu'),
  ],
  ids=str,
)
def test_a_threshold_needs_a_gate_that_bounds_the_output(gate):
  config = dataclasses.replace(BASE, gate=gate)
  with pytest.raises(ValueError, match=r'skip_below=0\.1 needs a gate'):
    generate(Decoder(config), {}, [[1]], skip_below=0.1)


def test_ids_without_a_token_are_not_generated():
  config, params = for_decoding(BASE, built(BASE))
  call = functools.partial(
    generate, Decoder(config), params, [tokens_of(4)], max_tokens=40
  )
  for sampling in (Sampling(), Sampling(temperature=2.0)):
    free = np.concatenate(list(call(sampling=sampling)))
    never = ((0, 7), (int(free[0]), int(free[0]) + 1), (30, 61))
    bound = dataclasses.replace(sampling, never=never)
    drawn = np.concatenate(list(call(sampling=bound)))
    assert ((drawn >= 7) & (drawn < 30) & (drawn != free[0])).all()
