"""The kernel of the norm and the gate in interpret mode against plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta import gated_norm
from gated_jax.ops.delta.pallas_tpu.gated_norm import NormSpec

EPS = 1e-3
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
  ('activation', 'dtype', 'tolerance'),
  [
    pytest.param('silu', 'float32', 2e-6, marks=pytest.mark.long),
    pytest.param('sigmoid', 'float32', 2e-6, marks=pytest.mark.nightly),
    pytest.param('silu', 'bfloat16', 8e-3, marks=pytest.mark.nightly),
  ],
)
def test_values_and_gradients_are_those_of_plain_arrays(
  activation, dtype, tolerance
):
  # Two pieces of tokens, of which the second is padded, in one step.
  y, logits, slope = (
    jnp.asarray(RNG.normal(size=(1, 200, 2, 128)), dtype) for _ in range(3)
  )
  scale = jnp.asarray(RNG.uniform(0.5, 2, 128), jnp.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def both_passes(function, *given):
    out, pull = jax.vjp(function, *given)
    return [out, *pull(slope.astype(out.dtype))]

  def plain(*given):
    return gated_norm.gated_norm(*given, EPS, activation, 'chunks')

  def kernel(*given):
    spec = NormSpec(128, EPS, activation)
    return gated_norm.by_kernel(*given, spec, interpret=True)

  wide = [x.astype(jnp.float32) for x in (y, logits)]
  expected = both_passes(plain, *wide, scale)
  found = both_passes(kernel, y, logits, scale)
  for x, reference in zip(found, expected, strict=True):
    off = np.abs(np.asarray(x, np.float32) - reference).max()
    assert off <= tolerance * np.abs(reference).max()
  assert [x.dtype for x in found[:3]] == [jnp.dtype(dtype)] * 3


def test_it_refuses_what_it_cannot_do():
  x = jnp.zeros((1, 8, 2, 128))
  assert not gated_norm.refusal(x)
  assert 'no whole 128' in gated_norm.refusal(x[..., :96])
  assert 'float16' in gated_norm.refusal(x.astype('float16'))
