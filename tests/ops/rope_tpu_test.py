"""The kernel for norm and rotation against matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.config import RopeConfig
from gated_jax.ops import rope
from gated_jax.ops import rope_tpu

B, T, N, H, EPS = 2, 48, 3, 128, 1e-5


def arrays(dtype):
  rng = np.random.default_rng(0)
  x, dy = (rng.normal(size=(B, T, N, H)) for _ in range(2))
  scale = rng.uniform(0.5, 1.5, size=H)
  positions = rng.integers(0, 5000, size=(B, T)).astype(np.int32)
  cast = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
  return (*cast, jnp.asarray(scale, jnp.float32), positions)


def matrices(positions, base=10_000.0):
  """[B, T, H, H] in float64, whose rows are what each channel becomes."""
  half = H // 2
  angle = positions[..., None] * base ** -(np.arange(half) / half)
  turn = np.zeros((*positions.shape, H, H))
  c = np.arange(half)
  turn[..., c, c] = turn[..., c + half, c + half] = np.cos(angle)
  turn[..., c, c + half] = -np.sin(angle)
  turn[..., c + half, c] = np.sin(angle)
  return turn


def expected(x, dy, scale, positions, norm):
  """Values and gradients of x and scale, in float64."""
  x, dy = (np.asarray(a, np.float64) for a in (x, dy))
  scale = np.asarray(scale, np.float64) if norm else np.ones(H)
  turn = matrices(positions)
  size = np.sqrt((x**2).mean(-1, keepdims=True) + EPS) if norm else 1.0
  y = np.einsum('BTij,BTNj->BTNi', turn, x / size * scale)
  dn = np.einsum('BTij,BTNi->BTNj', turn, dy)
  d_scale = (dn * x / size).sum((0, 1, 2))
  dx = dn * scale / size
  if norm:
    dx -= x * (dn * scale * x).mean(-1, keepdims=True) / size**3
  return y, dx, d_scale


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('norm', (True, False))
def test_values_and_gradients_are_those_of_matrices(dtype, norm):
  x, dy, scale, positions = arrays(dtype)
  rotation = rope.rotation(jnp.asarray(positions), H, RopeConfig())

  def run(x, scale):
    return rope_tpu.normalize_and_rotate(
      x, scale if norm else None, rotation, EPS, interpret=True
    )

  y, back = jax.vjp(run, x, scale)
  found = (y, *back(dy))
  want = expected(x, dy, scale, positions, norm)
  # Results are rounded once; what is between is float32.
  one = float(jnp.finfo(dtype).eps)
  for got, right, rounded in zip(found, want, (one, one, 1e-6), strict=True):
    if not norm and rounded == 1e-6:
      continue  # there is no scale
    bound = rounded * np.abs(right) + 4e-6 * np.abs(right).max()
    assert (np.abs(np.asarray(got, np.float64) - right) <= bound).all()


def test_what_does_not_fit_is_told():
  bf16 = jnp.dtype('bfloat16')
  assert rope_tpu.fits((2, 4096, 16, 128), bf16, 128)
  assert not rope_tpu.fits((2, 4096, 16, 64), bf16, 64)  # half a register
  assert not rope_tpu.fits((2, 4096, 16, 128), bf16, 64)  # partly rotary
  assert not rope_tpu.fits((2, 1, 16, 128), bf16, 128)  # decoding
