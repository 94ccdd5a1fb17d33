"""Activations and their derivatives, and the gate as a function on arrays."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gated_jax.ops import gate
from gated_jax.ops.gate import ACTIVATIONS
from gated_jax.ops.gate import GateSpec

# float64, written down once more; complex arguments give exact derivatives.
VALUES = {
  'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
  'silu': lambda x: x / (1 + np.exp(-x)),
  'identity': lambda x: x,
  'ns_sigmoid': lambda x: 0.5 + 0.5 / (1 + np.exp(-x)),
  'two_sigmoid': lambda x: 2 / (1 + np.exp(-x)),
  'softplus': lambda x: np.log1p(np.exp(x)),
}
POINTS = np.concatenate([np.linspace(-30, 30, 241), [-1e-3, 0.0, 1e-7]])
POINTS = POINTS.astype(np.float32)


def test_every_activation_of_the_table_is_known_here():
  assert set(VALUES) == set(ACTIVATIONS)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_values_and_derivatives_are_those_of_float64(name):
  x = POINTS.astype(np.float64)
  value = VALUES[name](x)
  slope = VALUES[name](x + 1e-30j).imag / 1e-30
  found = ACTIVATIONS[name]
  # Relative, down to exp(-30): hence no atol.
  np.testing.assert_allclose(found.value(jnp.asarray(POINTS)), value, 3e-6)
  # silu' crosses zero near -1.28.
  np.testing.assert_allclose(
    found.derivative(jnp.asarray(POINTS)), slope, 3e-6, atol=1e-7
  )


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_ratio_is_derivative_over_value_or_absent_where_value_is_zero(name):
  found = ACTIVATIONS[name]
  x = POINTS.astype(np.float64)
  if found.ratio is None:
    assert (np.abs(VALUES[name](x)) < 1e-30).any()
    return
  slope = VALUES[name](x + 1e-30j).imag / 1e-30
  ratio = slope / VALUES[name](x)
  np.testing.assert_allclose(
    found.ratio(jnp.asarray(POINTS)), ratio, rtol=1e-5, atol=1e-12
  )


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_nothing_overflows_far_out(name):
  far = jnp.array([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
  found = ACTIVATIONS[name]
  for function in (found.value, found.derivative, found.ratio):
    if function is not None:
      assert jnp.isfinite(function(far)).all()


def test_ranges_are_those_of_the_paper():
  x = jnp.linspace(-100, 100, 1001)
  for name, low, high in (
    ('sigmoid', 0.0, 1.0),
    ('ns_sigmoid', 0.5, 1.0),
    ('two_sigmoid', 0.0, 2.0),
  ):
    scores = gate.gate_scores(x, GateSpec(name))
    assert scores.min() >= low
    assert scores.max() <= high
    np.testing.assert_allclose([scores[0], scores[-1]], [low, high], atol=1e-6)
  np.testing.assert_array_equal(
    gate.gate_scores(jnp.zeros(1), GateSpec('two_sigmoid')), [1.0]
  )


def test_shared_scores_are_averages_over_heads_of_activated_logits():
  logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * 3
  scores = gate.gate_scores(jnp.asarray(logits, jnp.float32))
  shared = gate.share_over_heads(scores)
  expected = VALUES['sigmoid'](logits).sum(axis=2, keepdims=True) / 4
  assert shared.shape == (2, 3, 1, 5)
  np.testing.assert_allclose(shared, expected, rtol=1e-5)
  # Averaging before the activation would be something else.
  before = VALUES['sigmoid'](logits.sum(axis=2, keepdims=True) / 4)
  assert np.abs(before - shared).max() > 0.05


@pytest.mark.parametrize('additive', [False, True])
@pytest.mark.parametrize('width', [1, 8])
def test_float32_gate_rounds_once_and_model_dtype_rounds_each_step(
  width, additive
):
  rng = np.random.default_rng(1)
  bf16 = ml_dtypes.bfloat16
  y = rng.normal(size=(2, 16, 4, 8)).astype(bf16)
  logits = rng.normal(size=(2, 16, 4, width)).astype(bf16)
  scores = VALUES['sigmoid'](logits.astype(np.float64))

  def join(scores):
    wide = y.astype(np.float64)
    return (wide + scores if additive else wide * scores).astype(bf16)

  once, often = (
    np.asarray(
      gate.apply_gate(
        jnp.asarray(y),
        jnp.asarray(logits),
        GateSpec(additive=additive, model_dtype=model_dtype),
      )
    )
    for model_dtype in (False, True)
  )
  assert once.dtype == often.dtype == bf16

  def differing(found, expected):
    # A tie that float32 breaks the other way is allowed: very few.
    return (found.view(np.int16) != expected.view(np.int16)).mean()

  rounded = scores.astype(bf16).astype(np.float64)
  assert differing(once, join(scores)) < 0.005
  assert differing(often, join(rounded)) < 0.005
  # And the two are not the same thing.
  assert differing(once, often) > 0.05


def test_an_unknown_activation_is_refused_by_name():
  with pytest.raises(ValueError, match="activation='tanh' must be one of"):
    GateSpec('tanh')
