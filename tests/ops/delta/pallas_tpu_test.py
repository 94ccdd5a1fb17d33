"""The TPU kernels in interpret mode against the rule in plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta import chunks
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.pallas_tpu import call
from gated_jax.ops.delta.pallas_tpu import products

LENGTH = 300


@functools.cache
def arrays(dtype, key_heads=1):
  """One row; documents begin within chunks of 128 and at their ends."""
  rng = np.random.default_rng(0)

  def unit(*shape):
    x = rng.normal(size=shape) + 0.5
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  heads, values = (1, LENGTH, key_heads, 128), (1, LENGTH, 2 * key_heads)
  wide = (
    0.1 * unit(*heads),
    unit(*heads),
    rng.normal(size=(*values, 128)),
  )
  inputs = Inputs(
    *(jnp.asarray(x, dtype) for x in wide),
    jnp.asarray(-0.3 * rng.exponential(size=values), jnp.float32),
    jnp.asarray(rng.uniform(size=values), jnp.float32),
  )
  state = jnp.asarray(
    rng.normal(size=(1, 2 * key_heads, 128, 128)), jnp.float32
  )
  first = np.isin(np.arange(LENGTH), [37, 128, 200, 201])[None]
  return inputs, state, jnp.asarray(first)


def plain(inputs, state, first):
  wide = Inputs(*(x.astype(jnp.float32) for x in inputs))
  return chunks.by_chunks(wide, state, first)


@pytest.mark.parametrize(
  ('dtype', 'key_heads', 'atol'),
  [
    ('float32', 1, 2e-6),
    pytest.param('bfloat16', 2, 1e-2, marks=pytest.mark.long),
  ],
)
def test_outputs_and_the_last_state_are_those_of_plain_arrays(
  dtype, key_heads, atol
):
  inputs, state, first = arrays(dtype, key_heads)
  expected = jax.jit(plain)(inputs, state, first)
  found = call.by_kernel(inputs, state, first, True)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=atol * np.abs(b).max())


def test_the_inverse_of_the_stiffest_chunk_is_exact():
  ones = jnp.tril(jnp.ones((products.CHUNK, products.CHUNK)), -1)
  product = products.Products(jnp.dtype('bfloat16'))
  (found,) = products.inverses_of([ones], product)
  expected = np.eye(products.CHUNK) - np.eye(products.CHUNK, k=-1)
  np.testing.assert_array_equal(found, expected)


def test_inverses_are_precise_where_arrays_are_bfloat16():
  rng = np.random.default_rng(1)
  keys = rng.normal(size=(products.CHUNK, 16)) + 0.5
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  coupling = np.tril(keys @ keys.T, -1)
  product = products.Products(jnp.dtype('bfloat16'))
  (found,) = products.inverses_of([jnp.asarray(coupling, jnp.float32)], product)
  expected = np.linalg.inv(np.eye(products.CHUNK) + coupling)
  assert np.abs(expected).max() <= 1 + 1e-12
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_heads_that_do_not_fill_lanes_are_refused_by_name():
  inputs, state, first = arrays('float32')
  narrow = inputs._replace(value=inputs.value[..., :96])
  with pytest.raises(NotImplementedError, match='heads of 128 and 96 channels'):
    rule.delta_rule(narrow, state[..., :96], first, 'pallas_tpu')
  with pytest.raises(
    NotImplementedError, match='needs a TPU and this is a cpu'
  ):
    rule.check_platform('pallas_tpu', 'cpu')
