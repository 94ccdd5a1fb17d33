"""The first training step, and what is watched, against float64 NumPy.

Everything from the tokens to the new parameters is made here once more, from
the formulas: embedding, rotation, packed documents, attention with its gate,
MLP, loss, z-loss, clipping, AdamW. Derivatives are imaginary parts of the loss
at complex parameters, so no formula of a gradient stands here.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import DataConfig
from gated_jax.config import GateConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.evals import diagnostics
from gated_jax.model.decoder import Decoder
from gated_jax.training import build

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

B, T, V, D, N, K, H, F, L = 2, 8, 13, 8, 4, 2, 4, 12, 2

MODEL = ModelConfig(
  vocab=V,
  length=T,
  depth=L,
  width=D,
  heads=N,
  kv_heads=K,
  head_dim=H,
  mlp_width=F,
  dtype='float32',
  z_loss=0.01,
  logit_chunk=5,
  scan=False,
)
MODELS = {
  'sdpa_elementwise': MODEL,
  'value_headwise_untied_sandwich': dataclasses.replace(
    MODEL,
    gate=GateConfig(position='value', granularity='headwise'),
    tie_embeddings=False,
    norm='sandwich',
    qk_norm=False,
  ),
  'dense_output_window_linear': dataclasses.replace(
    MODEL,
    gate=GateConfig(position='dense_output'),
    pattern=('attention:window=3', 'attention'),
    rope=RopeConfig(base=100.0, fraction=0.5, scaling='linear', factor=2.0),
    norm_zero_centered=True,
  ),
}
OPTIMIZER = OptimizerConfig(
  learning_rate=1e-2,
  warmup_steps=3,
  weight_decay=0.2,
  clip_norm=0.5,
  gate_learning_rate=0.5,
  accumulate=2,
)
# Two rows: documents of 5 and 2 tokens and padding, then a single one.
BATCH = {
  'tokens': np.array([[12, 3, 1, 4, 1, 5, 9, 0], [2, 6, 5, 3, 5, 8, 9, 7]]),
  'targets': np.array([[3, 1, 4, 1, 12, 9, 12, 0], [6, 5, 3, 5, 8, 9, 7, 12]]),
  'segments': np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1] * 8]),
  'positions': np.array([[0, 1, 2, 3, 4, 0, 1, 0], [*range(8)]]),
  'weights': np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8], np.float32),
}


def drawn(shapes):
  """Parameters without structure, and scales that are not one."""
  rng = np.random.default_rng(3)

  def draw(path, x):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return rng.normal(mean, 0.3, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def rms(x, scale, c):
  one = 1 if c.norm_zero_centered else 0
  mean = (x * x).sum(-1, keepdims=True) / x.shape[-1]
  return x / np.sqrt(mean + c.norm_eps) * (scale + one)


def turn(z, c):
  """[B, T, heads, H]: pairs (i, i + R / 2) of the first R channels."""
  r = int(H * c.rope.fraction) // 2
  frequency = c.rope.base ** (-np.arange(r) / r) / c.rope.factor
  angle = (BATCH['positions'][..., None] * frequency)[:, :, None]
  a, b, rest = z[..., :r], z[..., r : 2 * r], z[..., 2 * r :]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(p, x, window, c, notes):
  """[B, T, D] to [B, T, D], with all of a head's weights at once."""
  q, k, v = (
    np.tensordot(x, p[name]['kernel'], 1) for name in ('query', 'key', 'value')
  )
  logits = np.tensordot(x, p['gate']['kernel'], 1)
  scores = sigmoid(logits)
  if c.gate.position == 'value':  # headwise
    v = v * scores[..., None]
  if c.qk_norm:
    q = rms(q, p['query_norm']['scale'], c)
    k = rms(k, p['key_norm']['scale'], c)
  q, k = turn(q, c), turn(k, c)
  back = np.arange(T)[:, None] - np.arange(T)
  seen = (back >= 0) & (back < (window or T))
  segments = BATCH['segments']
  seen = seen & (segments[:, :, None] == segments[:, None])
  weights = []
  for n in range(N):
    w = q[:, :, n] @ k[:, :, n * K // N].transpose(0, 2, 1)
    w = seen * np.exp(w / math.sqrt(H))
    weights.append(w / w.sum(-1, keepdims=True))
  notes.append({'weights': weights, 'logits': logits, 'scores': scores})
  out = np.stack(
    [w @ v[:, :, n * K // N] for n, w in enumerate(weights)], axis=2
  )
  if c.gate.position == 'sdpa_output':
    out = out * scores
  y = np.tensordot(out, p['out']['kernel'], 2)
  return y * scores if c.gate.position == 'dense_output' else y


def loss_of(params, c):
  """(total, nll, notes by layer) of BATCH; complex parameters pass through."""
  notes = []
  sandwich = c.norm == 'sandwich'
  x = params['embed']['embedding'][BATCH['tokens']]
  for layer in range(L):
    p = params[f'layers_{layer}']
    window = c.layers[layer].window
    h = rms(x, p['attention_norm']['scale'], c)
    y = attention(p['attention'], h, window, c, notes)
    x = x + (rms(y, p['attention_post_norm']['scale'], c) if sandwich else y)
    h = rms(x, p['mlp_norm']['scale'], c)
    g = h @ p['mlp']['gate_proj']['kernel']
    y = g * sigmoid(g) * (h @ p['mlp']['up']['kernel'])
    y = y @ p['mlp']['down']['kernel']
    x = x + (rms(y, p['mlp_post_norm']['scale'], c) if sandwich else y)
    notes[-1]['output'] = x
  x = rms(x, params['final_norm']['scale'], c)
  if c.tie_embeddings:
    logits = x @ params['embed']['embedding'].T
  else:
    logits = x @ params['unembed']['kernel']
  lse = np.log(np.exp(logits).sum(-1))
  at = np.take_along_axis(logits, BATCH['targets'][..., None], -1)[..., 0]
  weights = BATCH['weights'] / BATCH['weights'].sum()
  nll = (weights * (lse - at)).sum()
  return nll + c.z_loss * (weights * lse * lse).sum(), nll, notes


def gradient_of(params, c):
  """Entry by entry."""
  leaves, structure = jax.tree.flatten(params)
  found = [np.zeros(x.shape) for x in leaves]
  for leaf, slopes in zip(leaves, found, strict=True):
    wide = leaf.astype(complex)
    other = [wide if x is leaf else x for x in leaves]
    for place in np.ndindex(leaf.shape):
      wide[place] += 1e-30j
      total, *_ = loss_of(jax.tree.unflatten(structure, other), c)
      slopes[place] = total.imag / 1e-30
      wide[place] = leaf[place]
  return jax.tree.unflatten(structure, found)


@pytest.mark.parametrize('name', MODELS)
def test_the_first_step_is_the_one_that_the_formulas_give(name):
  c = MODELS[name]
  data = DataConfig(batch=B, length=T)
  config = RunConfig(steps=10, model=c, data=data, optimizer=OPTIMIZER)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with sharding.activate(mesh):
    shapes, _, step = build.make_functions(config, Decoder(c), mesh)
    old = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    old = old.replace(params=drawn(shapes.params))
    new, metrics = step(old, BATCH)
  params = jax.tree.map(np.float64, old.params)
  total, nll, _ = loss_of(params, c)
  np.testing.assert_allclose(metrics['total_loss'], total, rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], nll, rtol=1e-5)
  assert metrics['tokens'] == BATCH['weights'].sum()

  gradient = gradient_of(params, c)
  norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  assert norm > OPTIMIZER.clip_norm, 'clipping has to have something to do'

  # The first of three steps of warm-up; AdamW's first update is g / |g|.
  rate = OPTIMIZER.learning_rate / 4
  np.testing.assert_allclose(metrics['learning_rate'], rate, rtol=1e-6)
  paths = jax.tree_util.tree_leaves_with_path(gradient)
  for (path, g), before, after in zip(
    paths,
    jax.tree.leaves(params),
    jax.tree.leaves(new.params),
    strict=True,
  ):
    names = [key.key for key in path]
    g = g * OPTIMIZER.clip_norm / norm
    move = g / (np.abs(g) + OPTIMIZER.eps)
    if names[-1] != 'scale':
      move = move + OPTIMIZER.weight_decay * before
    own = rate * (OPTIMIZER.gate_learning_rate if 'gate' in names else 1)
    # Where a gradient is nothing but rounding, so is its sign.
    clear = np.abs(g) > 1e-5
    assert clear.mean() > 0.5, names
    np.testing.assert_allclose(
      np.asarray(after, np.float64)[clear],
      (before - own * move)[clear],
      rtol=0,
      atol=rate * 1e-3,
      err_msg='/'.join(names),
    )


@pytest.mark.parametrize('name', MODELS)
def test_what_is_watched_is_what_the_full_matrices_say(name):
  c = MODELS[name]
  model = Decoder(c)
  shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH['tokens'])
  params = drawn(meta.unbox(shapes)['params'])
  found = diagnostics.probe(model, params, [BATCH])
  *_, notes = loss_of(jax.tree.map(np.float64, params), c)
  valid = BATCH['segments'] > 0
  # Row, query and first key of each pair that counts; by hand from BATCH.
  pairs = [(0, t, 0) for t in (1, 2, 3, 4)] + [(0, 6, 5)]
  pairs += [(1, t, 0) for t in range(1, T)]
  for layer, seen in enumerate(notes):
    for n, w in enumerate(seen['weights']):
      share = np.mean([w[pair] for pair in pairs])
      np.testing.assert_allclose(found.first_token[layer, n], share, rtol=1e-5)
    np.testing.assert_allclose(
      found.activation[layer], np.abs(seen['output'])[valid].max(), rtol=1e-5
    )
    shape = {'sdpa_output': (N, H), 'value': (K, 1), 'dense_output': (1, D)}
    scores, logits = (
      seen[key][valid].reshape(-1, *shape[c.gate.position])
      for key in ('scores', 'logits')
    )
    for have, want in (
      (found.gate_mean, scores.mean((0, 2))),
      (found.gate_below, (scores < 0.1).mean((0, 2))),
      (found.gate_norm, np.sqrt((logits**2).sum(2)).mean(0)),
    ):
      np.testing.assert_allclose(have[layer], want, rtol=1e-5)
    inside = np.histogram(scores, np.linspace(0, 1, 21))[0] / scores.size
    np.testing.assert_allclose(found.gate_histogram[layer, 1:-1], inside)
