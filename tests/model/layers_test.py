"""Norm, linear maps, MLP and their initial values, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax.config import ModelConfig
from gated_jax.model import layers
from gated_jax.model import linear

CONFIG = ModelConfig(
  vocab=11,
  length=8,
  depth=1,
  width=6,
  heads=2,
  kv_heads=1,
  head_dim=4,
  mlp_width=10,
  dtype='float32',
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)


def shapes_of(module, *inputs):
  found = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  return meta.unbox(found)


def drawn(shapes, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes
  )


@pytest.mark.parametrize('zero_centered', [False, True])
def test_rms_norm_divides_by_the_root_of_the_mean_square(zero_centered):
  module = layers.Scale(6, zero_centered)
  params = drawn(shapes_of(module))
  wide, scale = np.float64(X), np.float64(params['scale'])
  expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5)
  expected *= scale + 1 if zero_centered else scale
  found = layers.rms_norm(X, module.apply({'params': params}), eps=0.5)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('zero_centered', [False, True])
def test_a_new_norm_has_a_scale_of_one(zero_centered):
  scale, _ = layers.Scale(6, zero_centered).init_with_output(jax.random.key(0))
  np.testing.assert_array_equal(scale, np.ones(6))


def test_rms_norm_of_bfloat16_is_made_in_float32_and_rounded_once():
  x = jnp.asarray(100 * X, jnp.bfloat16)
  scale = drawn({'scale': jnp.ones(6)})['scale']
  found = layers.rms_norm(x, scale, eps=1e-6)
  wide = layers.rms_norm(x.astype(jnp.float32), scale, eps=1e-6)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize('limit', [0.0, 0.5])
def test_mlp_is_swiglu_clamped_where_there_is_a_limit(limit):
  module = layers.MLP(CONFIG, CONFIG.mlp_width, limit)
  params = drawn(shapes_of(module, X))
  p = {name: np.float64(value['kernel']) for name, value in params.items()}
  x = np.float64(X)
  g, most = x @ p['gate_proj'], limit or np.inf
  g, up = np.minimum(g / (1 + np.exp(-g)), most), x @ p['up']
  up = np.sign(up) * np.minimum(np.abs(up), most)
  expected = (g * up) @ p['down']
  found = module.apply({'params': params}, X)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_layer_has_a_bias():
  for module, inputs in ((layers.MLP(CONFIG, 10), (X,)), (layers.Scale(6), ())):
    shapes = shapes_of(module, *inputs)
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
      assert path[-1].key in ('kernel', 'scale')


@pytest.mark.parametrize('std', [0.0, 0.5])
def test_linear_maps_start_with_the_deviation_asked_for(std):
  module = linear.Kernel(
    (6, 40, 50), ('embed', 'heads', 'head_dim'), init_std=std
  )
  kernel = module.init_with_output(jax.random.key(0))[0].value
  # 12,000 draws: 3% is five times their own deviation.
  np.testing.assert_allclose(np.std(kernel), std, rtol=0.03)
  np.testing.assert_allclose(np.mean(kernel), 0, atol=0.03)


def test_linear_maps_contract_as_many_axes_as_told():
  x = jax.random.normal(jax.random.key(2), (2, 3, 4, 5))
  module = linear.Kernel((4, 5, 7), ('heads', 'head_dim', 'embed'), inputs=2)
  matrix = module.init_with_output(jax.random.key(0))[0]
  expected = x.reshape(6, 20) @ matrix.value.reshape(20, 7)
  found = linear.project(x, matrix, 'float32')
  assert found.shape == (2, 3, 7)
  np.testing.assert_allclose(
    found.reshape(6, 7), expected, rtol=1e-4, atol=1e-5
  )


def test_row_by_row_is_the_same_array_with_the_same_gradient():
  def scaled(x):
    return 3 * linear.row_major(x, ('batch', 'length', 'mlp'))

  found, pull = jax.vjp(jax.jit(scaled), X)
  np.testing.assert_array_equal(found, 3 * X)
  np.testing.assert_array_equal(pull(X)[0], 3 * X)


def test_a_product_for_two_matrices_has_the_gradients_of_both():
  rng = np.random.default_rng(2)
  wide, narrow = rng.normal(size=(6, 7)), rng.normal(size=(6, 2))
  d_wide, d_narrow = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 2))
  x = np.float64(X)

  def both(x, wide, narrow):
    axes = ('embed', None)
    matrices = linear.Matrix(wide, axes), linear.Matrix(narrow, axes)
    return linear.project_both(x, *matrices, 'float64')

  with jax.enable_x64(True):
    found, pull = jax.vjp(both, x, wide, narrow)
    d_x, *d_matrices = pull((d_wide, d_narrow))
  np.testing.assert_allclose(found[0], x @ wide, rtol=1e-12)
  np.testing.assert_allclose(found[1], x @ narrow, rtol=1e-12)
  expected = d_wide @ wide.T + d_narrow @ narrow.T
  np.testing.assert_allclose(d_x, expected, rtol=1e-12)
  for matrix, d in zip(d_matrices, (d_wide, d_narrow), strict=True):
    expected = np.einsum('btd,btm->dm', x, d)
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)
