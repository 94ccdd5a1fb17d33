"""The TPU kernels in interpret mode against the rule in plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from gated_jax.ops.delta import chunks
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.pallas_tpu import call
from gated_jax.ops.delta.pallas_tpu import products
from tests.ops.delta.backward_test import by_hand

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


@jax.jit
def both_passes(inputs, state, first, slopes):
  """Output and last state of the kernels, and gradients of all that go in."""
  found, pull = jax.vjp(
    lambda x, s: call.by_kernel(x, s, first, True), inputs, state
  )
  return found, pull(slopes)


@functools.cache
def slopes():
  """Gradients of outputs and the last state of two value heads."""
  rng = np.random.default_rng(1)
  shapes = (1, LENGTH, 2, 128), (1, 2, 128, 128)
  return tuple(jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes)


def by_name(gradients):
  d_inputs, d_state = gradients
  return {**d_inputs._asdict(), 'state': d_state}


PRECISIONS = pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [
    ('float32', 2e-6),
    pytest.param('bfloat16', 1e-2, marks=pytest.mark.long),
  ],
)


@pytest.mark.long
@PRECISIONS
def test_outputs_and_the_last_state_are_those_of_plain_arrays(dtype, tolerance):
  expected = jax.jit(plain)(*arrays(dtype))
  found, _ = both_passes(*arrays(dtype), slopes())
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.long
@PRECISIONS
def test_gradients_are_those_written_by_hand(dtype, tolerance):
  _, found = both_passes(*arrays(dtype), slopes())
  expected = by_hand(*arrays(dtype), slopes(), products.CHUNK)
  for name, x in by_name(expected).items():
    error = np.abs(np.asarray(by_name(found)[name], np.float64) - x).max()
    assert error < tolerance * np.abs(x).max(), name


@pytest.mark.long
def test_no_gradient_of_a_later_document_reaches_an_earlier_one():
  later = np.arange(LENGTH)[None, :, None, None] >= 37
  d_output, d_last = slopes()
  _, found = both_passes(*arrays('float32'), (d_output * later, d_last))
  found = by_name(found)
  assert not np.any(found.pop('state'))
  for name, x in found.items():
    assert not np.any(x[:, :37]), name
    assert np.abs(x[:, 37:]).max() > 1e-3, name


@pytest.mark.long
def test_a_state_of_two_parts_as_of_a_split_sequence_has_its_gradients():
  # `context.py` gives the rule values [0 | v] and a state [I | 0].
  inputs, state, first = arrays('float32')
  value = jnp.pad(inputs.value, [(0, 0)] * 3 + [(128, 0)])
  both = inputs._replace(value=value)
  state = jnp.broadcast_to(jnp.eye(128, 256), (1, 2, 128, 256))
  rng = np.random.default_rng(2)
  slopes = tuple(
    jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (value, state)
  )
  _, found = both_passes(both, state, first, slopes)
  expected = by_hand(both, state, first, slopes, products.CHUNK)
  for name, x in by_name(expected).items():
    error = np.abs(np.asarray(by_name(found)[name], np.float64) - x).max()
    assert error < 2e-6 * np.abs(x).max(), name


@pytest.mark.nightly
def test_two_key_heads_pass_without_gradients_as_with_them():
  inputs, state, first = arrays('bfloat16', 2)
  slopes = jnp.ones(inputs.value.shape), jnp.ones(state.shape)
  expected, gradients = both_passes(inputs, state, first, slopes)
  found = jax.jit(call.by_kernel, static_argnums=3)(inputs, state, first, True)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(found, jax.jit(plain)(inputs, state, first), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())
  by_hands = by_hand(inputs, state, first, slopes, products.CHUNK)
  for name, x in by_name(by_hands).items():
    error = np.abs(np.asarray(by_name(gradients)[name], np.float64) - x).max()
    assert error < 1e-2 * np.abs(x).max(), name


@jax.jit
def inverse(coupling):
  """The inverse as kernels of bfloat16 arrays form it."""

  def kernel(coupling, inverse):
    product = products.Products(jnp.dtype('bfloat16'))
    (inverse[...],) = products.inverses_of([coupling[...]], product)

  coupling = jnp.asarray(coupling, jnp.float32)
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(coupling.shape, jnp.float32),
    interpret=True,
  )(coupling)


@pytest.mark.long
def test_the_inverse_of_the_stiffest_chunk_is_exact():
  ones = np.tril(np.ones((products.CHUNK, products.CHUNK)), -1)
  expected = np.eye(products.CHUNK) - np.eye(products.CHUNK, k=-1)
  np.testing.assert_array_equal(inverse(ones), expected)


def test_inverses_are_precise_where_arrays_are_bfloat16():
  rng = np.random.default_rng(1)
  keys = rng.normal(size=(products.CHUNK, 16)) + 0.5
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  coupling = np.tril(keys @ keys.T, -1)
  expected = np.linalg.inv(np.eye(products.CHUNK) + coupling)
  assert np.abs(expected).max() <= 1 + 1e-12
  np.testing.assert_allclose(inverse(coupling), expected, atol=2e-5)


def test_heads_that_do_not_fill_lanes_are_refused_by_name():
  inputs, state, first = arrays('float32')
  narrow = inputs._replace(value=inputs.value[..., :96])
  with pytest.raises(NotImplementedError, match='heads of 128 and 96 channels'):
    rule.delta_rule(narrow, state[..., :96], first, 'pallas_tpu')
  with pytest.raises(
    NotImplementedError, match='needs a TPU and this is a cpu'
  ):
    rule.check_platform('pallas_tpu', 'cpu')
