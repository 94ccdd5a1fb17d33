"""The kernels of a block's norm against float64, and in the model that has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.model import stream
from gated_jax.ops import norm_tpu

B, T, D, EPS = 2, 256, 384, 1e-5


def arrays(dtype):
  rng = np.random.default_rng(0)
  rows = (jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(3))
  return *rows, jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.float32)


def expected(x, d_h, d_stream, scale):
  x, d_h, d_stream, scale = (
    np.asarray(a, np.float64) for a in (x, d_h, d_stream, scale)
  )
  mean = (x**2).mean(-1)
  size = np.sqrt(mean + EPS)[..., None]
  d = d_h * scale
  dx = d_stream + d / size - x * (d * x).mean(-1, keepdims=True) / size**3
  return mean, dx, (d_h * x / size).sum((0, 1))


@pytest.mark.parametrize(
  ('dtype', 'error'), [('float32', 1e-5), ('bfloat16', 1e-2)]
)
def test_both_passes_are_those_of_matrices(dtype, error):
  given = arrays(dtype)
  mean, dx, d_scale = expected(*given)
  found = norm_tpu.mean_square(given[0], interpret=True)
  np.testing.assert_allclose(found, mean, rtol=1e-5)
  gradients = norm_tpu.backward(*given, EPS, interpret=True)
  assert gradients.x.dtype == dtype
  close = functools.partial(np.testing.assert_allclose, rtol=error, atol=error)
  close(np.asarray(gradients.x, np.float64), dx)
  np.testing.assert_allclose(
    gradients.scale.sum((0, 1)), d_scale, rtol=1e-4, atol=1e-3
  )


def test_what_does_not_fit():
  assert norm_tpu.fits((1, 128, 128), jnp.bfloat16)
  assert not norm_tpu.fits((1, 1, 128), jnp.bfloat16)  # decoding
  assert not norm_tpu.fits((1, 128, 64), jnp.bfloat16)
  assert not norm_tpu.fits((1, 128, 128), jnp.float16)


@pytest.mark.parametrize('mesh', [None, MeshConfig(fsdp=2, tensor=2)])
def test_a_stream_is_read_as_without_kernels(mesh, monkeypatch):
  x, weights, others, scale = arrays('float32')

  def run():
    """A function that is traced anew."""

    def loss(x, scale):
      past, h = stream.read(x, scale, EPS, 'auto')
      return jnp.sum(weights * h) + jnp.sum(others * jnp.sin(past))

    return jax.value_and_grad(loss, (0, 1))

  plain = jax.jit(run())(x, scale)
  monkeypatch.setattr(stream, 'on_tpu', lambda implementation: True)
  for name in ('mean_square', 'backward'):
    kernel = functools.partial(getattr(norm_tpu, name), interpret=True)
    monkeypatch.setattr(norm_tpu, name, kernel)
  text = str(jax.make_jaxpr(run())(x, scale))
  assert text.count('pallas_call') == 2
  if mesh is None:
    found = jax.jit(run())(x, scale)
  else:
    with sharding.activate(sharding.make_mesh(mesh, jax.devices()[:4])):
      found = jax.jit(run())(x, scale)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
  jax.tree.map(close, found, plain)
