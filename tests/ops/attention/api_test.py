"""The door: choice of a backend, and errors that name the value."""

import logging
import re

import jax.numpy as jnp
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
  'a missing axis': ((Q[0], K, V), {}, r'query of shape \(6, 4, 8\)'),
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
