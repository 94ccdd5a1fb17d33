"""The door: choice of a backend, and errors that name the value."""

import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.config import ModelConfig
from gated_jax.ops.attention import api
from gated_jax.ops.attention import gated_dot_product_attention
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Backend
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result


def arrays(t=6, s=6, n=4, k=2, h=8):
  return jnp.ones((2, t, n, h)), jnp.ones((2, s, k, h)), jnp.ones((2, s, k, h))


@pytest.fixture
def backends(monkeypatch):
  """Two that say who they are; the first refuses windows."""

  def picky(inputs, masking, spec):
    if spec.window:
      raise NotImplementedError('picky attention cannot do this: window')
    return Result(jnp.full((2, 6, 4, 8), 1.0), None)

  def willing(*_):
    return Result(jnp.full((2, 6, 4, 8), 2.0), None)

  table = {
    'picky': Backend(picky, platform='cpu'),
    'elsewhere': Backend(willing, platform='tpu'),
    'xla': Backend(willing),
  }
  monkeypatch.setattr(api, 'BACKENDS', table)
  monkeypatch.setattr(api.jax, 'default_backend', lambda: 'cpu')
  api._announce.cache_clear()
  yield table
  api._announce.cache_clear()


def test_automatic_choice_takes_the_first_that_can_and_logs_once(
  backends, caplog
):
  caplog.set_level(logging.INFO)
  for _ in range(3):
    assert gated_dot_product_attention(*arrays()).output[0, 0, 0, 0] == 1
  assert [r.getMessage() for r in caplog.records] == ['attention on cpu: picky']
  for _ in range(3):
    output, _ = gated_dot_product_attention(
      *arrays(), spec=AttentionSpec(window=2)
    )
    assert output[0, 0, 0, 0] == 2
  assert [r.getMessage() for r in caplog.records[1:]] == [
    'attention on cpu: xla (picky attention cannot do this: window)'
  ]


def test_a_backend_asked_for_by_name_is_never_replaced(backends, caplog):
  caplog.set_level(logging.INFO)
  with pytest.raises(NotImplementedError, match=r'picky .* window'):
    gated_dot_product_attention(
      *arrays(), spec=AttentionSpec(window=2), implementation='picky'
    )
  output, _ = gated_dot_product_attention(*arrays(), implementation='xla')
  assert output[0, 0, 0, 0] == 2
  assert not caplog.records


@pytest.mark.parametrize(
  ('platform', 'names'),
  [
    ('tpu', ('pallas_tpu', 'splash', 'xla')),
    ('gpu', ('cudnn', 'xla')),
    ('cpu', ('xla',)),
  ],
)
def test_automatic_choice_tries_these_on_a_platform(platform, names):
  assert api.candidates('auto', platform) == names
  for name in ('auto', *names):
    api.check_platform(name, platform)


def test_configs_can_name_every_backend():
  for name in api.BACKENDS:
    assert ModelConfig(attention=name).attention == name


def test_an_unknown_backend_is_an_error_that_lists_the_known():
  with pytest.raises(ValueError, match=r"implementation='flash3' .* xla"):
    gated_dot_product_attention(*arrays(), implementation='flash3')


Q, K, V = arrays()
WRONG = {
  'too few axes': ((Q[0, 0], K, V), {}, r'query of shape \(4, 8\)'),
  'a missing axis': ((Q[0], K, V), {}, r'query \(6, 4, 8\), .* in batch'),
  'key and value differ': ((Q, K, V[:, 1:]), {}, r'\(2, 5, 2, 8\)'),
  'batches differ': ((Q, K[:1], V[:1]), {}, 'agree in batch'),
  'widths differ': ((Q, K[..., :4], V), {}, 'head width'),
  'heads': ((Q[:, :, :3], K, V), {}, '3 query heads .* 2 kv heads'),
  'gate width': ((Q, K, V, Q[..., :3]), {}, r'gate logits \(2, 6, 4, 3\)'),
  'gate of kv heads': ((Q, K, V, K), {}, r'gate logits \(2, 6, 2, 8\)'),
  'one segment array': (
    (Q, K, V),
    {'masking': Masking(query_segments=jnp.ones((2, 6), int))},
    'come together',
  ),
  'short segments': (
    (Q, K, V),
    {'masking': Masking(jnp.ones((2, 5), int), jnp.ones((2, 6), int))},
    r'segments \(\(2, 5\), \(2, 6\)\)',
  ),
  'offsets of another batch': (
    (Q, K, V),
    {'masking': Masking(query_offset=jnp.zeros(3, int))},
    r'query_offset \(3,\) must be \(2,\)',
  ),
  'a mask without heads': (
    (Q, K, V),
    {'masking': Masking(mask=jnp.ones((2, 6, 6), bool))},
    r'mask \(2, 6, 6\) must be \(2, 4, 6, 6\)',
  ),
  'a mask of other queries': (
    (Q, K, V),
    {'masking': Masking(mask=jnp.ones((2, 1, 5, 6), bool))},
    r'mask \(2, 1, 5, 6\) must be',
  ),
}


@pytest.mark.parametrize('name', WRONG)
def test_shapes_that_do_not_fit_are_named(name):
  arguments, options, message = WRONG[name]
  with pytest.raises(Exception) as error:
    gated_dot_product_attention(*arguments, **options)
  # Under run-time shape checking the annotation speaks first.
  if type(error.value).__name__ != 'TypeCheckError':
    assert type(error.value) is ValueError
    assert re.search(message, str(error.value))


def numbers(*shape):
  rng = np.random.default_rng(len(shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize('batch', [(), (2, 3)])
@pytest.mark.parametrize('masked', [False, True])
def test_there_may_be_any_number_of_batch_axes(batch, masked):
  rows = math.prod(batch)
  query, key, value, gate = (
    numbers(rows, 5, heads, width)
    for heads, width in ((4, 8), (2, 8), (2, 3), (4, 3))
  )
  ids = jnp.arange(rows * 5).reshape(rows, 5) // 3
  mask = numbers(1 if masked else rows, 4, 1, 5) > 0
  masks = {'query_segments': ids, 'kv_segments': ids, 'mask': mask}
  if not masked:
    masks = {'query_offset': jnp.arange(rows)}
  spec = AttentionSpec(return_lse=True)
  expected = gated_dot_product_attention(
    query, key, value, gate, masking=Masking(**masks), spec=spec
  )

  def shaped(x):
    lead = batch if len(x) == rows else (1,) * len(batch)
    return x.reshape((*lead, *x.shape[1:]))

  found = gated_dot_product_attention(
    *(shaped(x) for x in (query, key, value, gate)),
    masking=Masking(**{name: shaped(x) for name, x in masks.items()}),
    spec=spec,
  )
  for a, b in zip(found, expected, strict=True):
    assert a.shape == (*batch, *b.shape[1:])
    np.testing.assert_array_equal(a.reshape(b.shape), b)


@pytest.mark.long
@pytest.mark.parametrize('channels', [1, 3])
def test_plain_attention_has_forward_mode_and_second_derivatives(channels):
  query, key, value = numbers(2, 2, 2), numbers(2, 1, 2), numbers(2, 1, 3)
  gate = numbers(2, 2, channels)
  # The first query sees nothing.
  ids = jnp.array([1, 2]), jnp.array([2, 2])

  @jax.jit
  def total(flat):
    parts = jnp.split(flat, np.cumsum([query.size, key.size, value.size]))
    shapes = [x.shape for x in (query, key, value, gate)]
    arrays = [x.reshape(s) for x, s in zip(parts, shapes, strict=True)]
    output, lse = gated_dot_product_attention(
      *arrays, masking=Masking(*ids), spec=AttentionSpec(return_lse=True)
    )
    return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  with jax.enable_x64(True):
    flat = jnp.concatenate(
      [jnp.ravel(x).astype(float) for x in (query, key, value, gate)]
    )
    along = jnp.cos(jnp.arange(flat.size) * 1.0)
    step = 1e-4 * along
    slope = (total(flat + step) - total(flat - step)) / 2e-4
    curve = (total(flat + step) - 2 * total(flat) + total(flat - step)) / 1e-8
    _, forward = jax.jvp(total, (flat,), (along,))
    np.testing.assert_allclose(forward, slope, rtol=1e-6)
    hessian = jax.jit(jax.hessian(total))(flat)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    np.testing.assert_allclose(along @ hessian @ along, curve, rtol=1e-5)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'window': -1}, 'window=-1'),
    ({'window': 4, 'causal': False}, 'window=4 needs causal=True'),
    ({'dropout': 1.0}, 'dropout=1.0'),
  ],
)
def test_options_that_mean_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    AttentionSpec(**options)


@pytest.mark.parametrize(
  ('name', 'platform', 'message'),
  [
    ('splash', 'cpu', 'splash attention .* needs a TPU and this is a cpu'),
    ('pallas_tpu', 'gpu', 'pallas_tpu attention .* needs a TPU .* is a gpu'),
    ('cudnn', 'tpu', 'cudnn attention .* needs a GPU and this is a tpu'),
  ],
)
def test_a_backend_that_the_hardware_lacks_is_refused(name, platform, message):
  with pytest.raises(NotImplementedError, match=message):
    api.check_platform(name, platform)
