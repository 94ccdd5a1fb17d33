"""Probes gathered from models of several layouts, and averaged right."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gated_jax.config import ModelConfig
from gated_jax.evals import diagnostics
from gated_jax.ops import probes


class Layer(nn.Module):
  """Sows numbers that say which layer it is."""

  gated: bool = True

  @nn.compact
  def __call__(self, x, valid):
    index = self.param('index', nn.initializers.zeros, ())
    heads = jnp.arange(1.0, 3.0)
    count = jnp.sum(valid, dtype=jnp.float32)
    share = probes.HeadTotals(count * (index + heads / 10), count)
    self.sow('probes', 'first_token', share)
    near = probes.HeadTotals(count * (0.045 * index + heads / 10), count)
    self.sow('probes', 'first_token_near', near)
    self.sow('probes', 'attention_logit_max', jnp.max(x) + index)
    x = x + index
    self.sow('probes', 'residual_max', jnp.max(jnp.abs(x)))
    if self.gated:
      scores = jnp.zeros((1, 1, 3, 1)) + 0.03 + 0.1 * index
      self.sow('probes', 'gate_scores', probes.score_statistics(scores, valid))
    if self.is_mutable_collection('attention_maps'):
      t = x.shape[1]
      maps = jnp.zeros((x.shape[0], 2, t, t)) + index
      self.sow('attention_maps', 'attention_weights', maps)
    return x


class Pattern(nn.Module):
  """Two layers that a scan repeats."""

  gated: bool = True

  @nn.compact
  def __call__(self, x, valid):
    for i in range(2):
      x = Layer(self.gated, name=f'block_{i}')(x, valid)
    return x, None


class Loss(NamedTuple):
  nll: jax.Array
  weight: jax.Array


class Model(nn.Module):
  """Twelve layers, with or without scan and pattern."""

  layout: str
  gated: bool = True

  @property
  def config(self):
    return ModelConfig(
      depth=12,
      scan=self.layout != 'loop',
      pattern=('attention',) * (2 if self.layout == 'pattern' else 1),
    )

  @nn.compact
  def loss(self, batch, deterministic):
    assert deterministic
    valid = batch['segments'] != 0
    x = batch['tokens'].astype(jnp.float32)[..., None]
    if self.layout == 'loop':
      for i in range(12):
        x = Layer(self.gated, name=f'layers_{i}')(x, valid)
    else:
      repeated = Pattern if self.layout == 'pattern' else Single
      scanned = nn.scan(
        repeated,
        variable_axes={'params': 0, 'probes': 0, 'attention_maps': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=6 if self.layout == 'pattern' else 12,
      )
      x, _ = scanned(self.gated, name='layers')(x, valid)
    return Loss(jnp.mean(x), jnp.sum(valid, dtype=jnp.float32))


class Single(nn.Module):
  gated: bool = True

  @nn.compact
  def __call__(self, x, valid):
    return Layer(self.gated, name='layer')(x, valid), None


def batch(tokens, padding=0):
  tokens = jnp.asarray(tokens, jnp.int32)
  segments = jnp.ones_like(tokens).at[:, tokens.shape[1] - padding :].set(0)
  return {'tokens': tokens, 'segments': segments}


def parameters(layout):
  """Layer i has index i."""
  if layout == 'loop':
    return {f'layers_{i}': {'index': jnp.asarray(float(i))} for i in range(12)}
  index = jnp.arange(12.0)
  if layout == 'pattern':
    return {'layers': {f'block_{i}': {'index': index[i::2]} for i in range(2)}}
  return {'layers': {'layer': {'index': index}}}


NOTHING = diagnostics.Report(
  *[np.zeros((0, 0))] * 6,
  maps={},
)

LAYOUTS = [
  pytest.param('loop', marks=pytest.mark.long),
  'scan',
  pytest.param('pattern', marks=pytest.mark.long),
]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layers_come_in_the_order_they_run_in_every_layout(layout):
  tokens = np.zeros((2, 5), int)
  report = diagnostics.probe(Model(layout), parameters(layout), [batch(tokens)])
  index = np.arange(12)
  np.testing.assert_allclose(
    report.first_token, index[:, None] + [[0.1, 0.2]], rtol=1e-6
  )
  np.testing.assert_allclose(report.activation, np.cumsum(index), rtol=1e-6)
  assert sorted(report.maps) == [0, 4, 7, 11]
  for layer, weights in report.maps.items():
    np.testing.assert_array_equal(weights, np.full((2, 5, 5), layer))


def test_batches_count_by_their_tokens_and_maxima_are_kept():
  few, many = batch([[7, 0, 0]], padding=2), batch(np.ones((2, 3), int))
  model, params = Model('scan'), parameters('scan')
  report = diagnostics.probe(model, params, [few, many])
  np.testing.assert_allclose(report.activation[0], 7)
  np.testing.assert_allclose(
    report.gate_mean[:, 0], 0.03 + 0.1 * np.arange(12), rtol=1e-6
  )
  np.testing.assert_array_equal(report.gate_below[:, 0], [1.0] + [0.0] * 11)
  np.testing.assert_allclose(report.gate_histogram.sum(1), np.ones(12))
  # 0.03 lies in the first bin from zero on, 1.13 above one.
  assert report.gate_histogram[0, 1] == 1
  assert report.gate_histogram[11, -1] == 1


def test_means_over_batches_are_weighted():
  sums = {'first_token': probes.HeadTotals(np.array([[3.0]]), np.array([4.0]))}
  more = jax.tree.map(
    np.add,
    sums['first_token'],
    probes.HeadTotals(np.array([[0.0]]), np.array([8.0])),
  )
  report = diagnostics._divide({'first_token': more}, {}, {})
  np.testing.assert_allclose(report.first_token, [[0.25]])


def test_scalars_are_flat_and_a_model_without_gate_has_none_of_its():
  report = diagnostics.probe(
    Model('scan', gated=False),
    parameters('scan'),
    [batch(np.zeros((1, 4), int))],
  )
  scalars = report.scalars()
  assert scalars['sink/mean'] == pytest.approx(5.5 + 0.15)
  assert scalars['sink/layer_03'] == pytest.approx(3.15)
  assert scalars['activation/mean'] == pytest.approx(
    np.cumsum(np.arange(12)).mean()
  )
  assert scalars['activation/max'] == 66
  assert not any(name.startswith('gate') for name in scalars)
  assert all(isinstance(x, float) for x in scalars.values())
  summary = {name: value for name, value, _ in report.summary()}
  assert summary['largest activation'] == 66
  assert np.isnan(summary['mean gate'])


def look(gated=True):
  return diagnostics.probe(
    Model('loop', gated), parameters('loop'), [batch(np.zeros((1, 4), int))]
  )


def test_sink_heads_are_those_above_the_threshold():
  report = look()
  # Layer i gives i + 0.1 and i + 0.2, and 0.045 i in short texts, plus the same.
  np.testing.assert_array_equal(report.sink_heads, [0.0, *[1.0] * 11])
  np.testing.assert_array_equal(report.near_sink_heads[:4], [0, 0, 0, 0.5])
  scalars = report.scalars()
  assert scalars['sink/heads_above_0.3'] == pytest.approx(11 / 12)
  assert scalars['sink/heads_above_0.3/layer_00'] == 0
  assert scalars['sink/max_head'] == pytest.approx(11.2)
  assert scalars['sink_64/mean'] == pytest.approx(0.045 * 5.5 + 0.15)
  assert scalars['sink_64/heads_above_0.3'] == pytest.approx((2 * 0.5 + 7) / 12)
  # The stream holds the sum of the indices before, and each adds its own.
  assert scalars['attention_logit/layer_03'] == 6
  assert scalars['attention_logit/max'] == 66


def test_layers_can_be_left_out_of_means():
  report = look().from_layer(2)
  scalars = report.scalars()
  assert scalars['sink/mean'] == pytest.approx(np.mean(range(2, 12)) + 0.15)
  assert scalars['sink/heads_above_0.3'] == 1
  assert scalars['sink/layer_00'] == pytest.approx(2.15)
  assert sorted(report.maps) == [2, 5, 9]


def test_arrays_are_json_with_null_for_what_is_no_number():
  report = dataclasses.replace(look(gated=False), activation=np.array([np.inf]))
  arrays = json.loads(json.dumps(report.arrays(), allow_nan=False))
  assert arrays['activation'] == [None]
  assert arrays['first_token'][3] == [3.1, 3.2]
  assert arrays['gate_mean'] == []
  assert 'maps' not in arrays


def test_no_batches_are_an_error():
  with pytest.raises(ValueError, match='no batches'):
    diagnostics.probe(Model('scan'), parameters('scan'), [])


def test_layers_may_differ_in_heads_and_in_what_they_sow():
  few = probes.HeadTotals(jnp.array([8.0]), jnp.float32(10))
  many = probes.HeadTotals(jnp.array([1.0, 2.0, 6.0]), jnp.float32(10))
  sown = {
    'layers_0': {'attention': {'first_token': (few,)}},
    'layers_2': {'attention': {'first_token': (many,)}},
  }
  config = ModelConfig(depth=3, scan=False)
  found = diagnostics.by_layer(config, sown)['first_token']
  assert found.layers == (0, 2)
  nan = np.nan
  np.testing.assert_array_equal(found.value.total, [[8, nan, nan], [1, 2, 6]])
  report = dataclasses.replace(
    NOTHING,
    first_token=np.array([[0.8, nan, nan], [0.1, 0.2, 0.6]]),
    attention_layers=(0, 2),
  )
  np.testing.assert_allclose(report.sink_heads, [1, 1 / 3])
  scalars = report.scalars()
  assert scalars['sink/layer_00'] == pytest.approx(0.8)
  assert scalars['sink/layer_02'] == pytest.approx(0.3)
  assert 'sink/layer_01' not in scalars
  later = report.from_layer(1)
  assert later.attention_layers == (1,)
  np.testing.assert_array_equal(later.first_token, [[0.1, 0.2, 0.6]])
