"""ops/delta against loops over tokens in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta import chunks
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.inverse import unit_lower_inverse
from gated_jax.ops.delta.norm import normalize

ROWS, KEY_HEADS, VALUE_HEADS, WIDTH, CHANNELS = 2, 2, 4, 8, 6


def arrays(length, seed=0, decay=1.0):
  """Random inputs; keys resemble each other, as trained ones do."""
  rng = np.random.default_rng(seed)

  def unit(*shape):
    x = rng.normal(size=shape) + 0.7
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  heads = (ROWS, length, KEY_HEADS, WIDTH)
  values = (ROWS, length, VALUE_HEADS)
  return Inputs(
    unit(*heads),
    unit(*heads),
    rng.normal(size=(*values, CHANNELS)),
    -decay * rng.exponential(size=values),
    rng.uniform(size=values),
  )


def loop(inputs, state, first):
  """The rule of one head at a time, one token after the other."""
  state = state.astype(np.float64).copy()
  output = np.zeros(inputs.value.shape)
  repeats = VALUE_HEADS // KEY_HEADS
  for b in range(ROWS):
    for n in range(VALUE_HEADS):
      s = state[b, n]
      for t in range(output.shape[1]):
        if first[b, t]:
          s = np.zeros_like(s)
        key, query = (x[b, t, n // repeats] for x in (inputs.key, inputs.query))
        s = np.exp(inputs.log_decay[b, t, n]) * s
        error = inputs.value[b, t, n] - key @ s
        s = s + np.outer(key, inputs.beta[b, t, n] * error)
        output[b, t, n] = query @ s
      state[b, n] = s
  return output, state


def single(inputs):
  return Inputs(*(jnp.asarray(x, jnp.float32) for x in inputs))


def states(seed=3):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(ROWS, VALUE_HEADS, WIDTH, CHANNELS))


# Twenty tokens are two chunks and a half.
in_eights = jax.jit(functools.partial(chunks.by_chunks, chunk=8))
whole = jax.jit(rule.delta_rule)
FORMS = {
  'recurrence': jax.jit(rule.recurrence),
  'chunks': jax.jit(chunks.by_chunks),
}


@pytest.mark.parametrize('decay', [0.05, 1.0, 40.0])
@pytest.mark.parametrize('length', [1, 5, 64, 150])
@pytest.mark.parametrize('form', FORMS)
def test_tokens_read_and_write_what_a_loop_does(form, length, decay):
  inputs, state = arrays(length, decay=decay), states()
  first = np.random.default_rng(5).uniform(size=(ROWS, length)) < 0.1
  first[0] = False
  expected = loop(inputs, state, first)
  args = single(inputs), jnp.asarray(state, jnp.float32), jnp.asarray(first)
  found = FORMS[form](*args)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_equal_keys_written_whole_leave_only_the_last_value():
  # Every entry of I + A on and below the diagonal is one: the stiffest chunk.
  inputs = arrays(130)
  key = np.broadcast_to(inputs.key[:, :1], inputs.key.shape)
  zeros, ones = np.zeros_like(inputs.beta), np.ones_like(inputs.beta)
  inputs = Inputs(key, key, inputs.value, zeros, ones)
  found = whole(single(inputs)).output
  np.testing.assert_allclose(found, inputs.value, atol=2e-5)


@pytest.mark.parametrize('cut', range(1, 20))
def test_documents_are_as_if_apart_at_every_offset_in_a_chunk(cut):
  inputs = arrays(20, decay=0.1)
  first = np.broadcast_to(np.arange(20) == cut, (ROWS, 20))
  zeros = np.zeros((ROWS, VALUE_HEADS, WIDTH, CHANNELS))
  packed, state = in_eights(single(inputs), zeros.astype(np.float32), first)
  for begin, end in ((0, cut), (cut, 20)):
    apart = Inputs(*(x[:, begin:end] for x in inputs))
    output, last = loop(apart, zeros, np.zeros_like(first))
    np.testing.assert_allclose(packed[:, begin:end], output, atol=5e-6)
  np.testing.assert_allclose(state, last, atol=5e-6)


def test_nothing_of_one_document_reaches_the_next_one():
  cut = 11
  inputs = single(arrays(20, decay=0.1))
  first = jnp.broadcast_to(jnp.arange(20) == cut, (ROWS, 20))

  def later(value, state):
    output, last = in_eights(inputs._replace(value=value), state, first)
    return jnp.sum(output[:, cut:] ** 2) + jnp.sum(last**2)

  state = jnp.asarray(states(), jnp.float32)
  slopes = jax.grad(later, (0, 1))(inputs.value, state)
  assert not np.any(slopes[0][:, :cut])
  assert not np.any(slopes[1])
  assert np.abs(slopes[0][:, cut:]).max() > 0.1


def test_gradients_of_chunks_are_those_of_the_recurrence():
  inputs, state = single(arrays(20)), jnp.asarray(states(), jnp.float32)
  first = jnp.asarray(np.random.default_rng(5).uniform(size=(ROWS, 20)) < 0.1)
  slope = np.random.default_rng(6).normal(size=inputs.value.shape)

  def gradients(form):
    def weighted(inputs, state):
      output, last = form(inputs, state, first)
      return jnp.sum(output * slope) + jnp.sum(last**2)

    return jax.jit(jax.grad(weighted, (0, 1)))(inputs, state)

  found, expected = (gradients(form) for form in (in_eights, rule.recurrence))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_padding_leaves_the_state_as_it_is():
  inputs, state = arrays(20), states()
  valid = np.arange(20) < np.array([[4], [20]])
  args = single(inputs).without_padding(valid), state.astype(np.float32)
  _, found = in_eights(*args, np.zeros_like(valid))
  for row, length in enumerate((4, 20)):
    part = Inputs(*(x[:, :length] for x in inputs))
    _, expected = loop(part, state, np.zeros_like(valid))
    np.testing.assert_allclose(found[row], expected[row], atol=5e-6)


def test_bfloat16_keeps_the_state_in_float32():
  inputs = single(arrays(16))
  narrow = inputs._replace(
    **{
      name: getattr(inputs, name).astype(jnp.bfloat16)
      for name in ('query', 'key', 'value')
    }
  )
  found, expected = whole(narrow), whole(inputs)
  assert found.state.dtype == found.output.dtype == jnp.float32
  np.testing.assert_allclose(found.output, expected.output, atol=0.05)


def test_first_tokens_of_documents():
  segments = jnp.array([[1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 5]])
  found = rule.first_tokens(segments)
  expected = [[1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]]
  np.testing.assert_array_equal(found, expected)
  found = rule.first_tokens(segments, jnp.array([1, 2]))
  expected = [[0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]]
  np.testing.assert_array_equal(found, expected)


def test_normalized_vectors_have_the_length_asked_for():
  x = np.random.default_rng(0).normal(size=(3, 8))
  expected = 0.5 * x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
  found = normalize(jnp.asarray(x, jnp.float32), 0.5)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('size', [1, 2, 16, 64])
def test_the_inverse_of_a_triangular_matrix_and_its_gradient(size):
  rng = np.random.default_rng(size)
  a = np.tril(rng.uniform(-0.3, 0.3, size=(3, size, size)), -1)
  found = unit_lower_inverse(jnp.asarray(a, jnp.float32))
  expected = np.linalg.inv(np.eye(size) + a)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
  slope = rng.normal(size=a.shape)

  def weighted(a):
    return jnp.sum(unit_lower_inverse(a) * slope)

  found = np.tril(jax.grad(weighted)(jnp.asarray(a, jnp.float32)), -1)
  step = np.tril(rng.normal(size=a.shape), -1)
  near = [np.linalg.inv(np.eye(size) + a + s * step) for s in (1e-6, -1e-6)]
  expected = np.sum((near[0] - near[1]) * slope) / 2e-6
  scale = np.sum(np.abs(found * step)) + 1e-9
  np.testing.assert_allclose(np.sum(found * step), expected, atol=1e-4 * scale)
