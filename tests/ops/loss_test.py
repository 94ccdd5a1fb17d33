"""Cross-entropy in chunks against float64 NumPy, gradients included.

The reference has all logits at once, and no gradient formula: a derivative is
the imaginary part of the loss at a complex argument.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.loss import LossSpec
from gated_jax.ops.loss import chunk_of
from gated_jax.ops.loss import cross_entropy
from gated_jax.ops.loss import local_loss

B, T, D, V = 2, 7, 5, 11
# Padding, tokens that count, and some that count otherwise: their sum is 8.
WEIGHTS = np.array([[1, 1, 0, 1, 0.5, 1, 0], [0, 0, 1, 1, 1, 0.5, 0]])


def reference(x, matrix, targets, weights, z_loss, softcap=0.0):
  """(total, nll, z); complex arguments pass through."""
  logits = x.reshape(-1, D) @ matrix
  if softcap:
    logits = softcap * np.tanh(logits / softcap)
  lse = np.log(np.exp(logits).sum(axis=1))
  nll = lse - logits[np.arange(len(logits)), targets.ravel()]
  share = weights.ravel() / weights.sum()
  nll, z = np.dot(share, nll), np.dot(share, lse * lse)
  return nll + z_loss * z, nll, z


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  x, matrix = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
  return x, matrix, rng.integers(0, V, (B, T))


def derivative(f, x):
  """Of a real function, entry by entry."""
  found = np.zeros(x.shape)
  for place in np.ndindex(x.shape):
    step = np.zeros(x.shape, complex)
    step[place] = 1e-30j
    found[place] = f(x + step).imag / 1e-30
  return found


def run(x, matrix, targets, weights, spec):
  """Sums, and the gradients of `total`."""
  targets, weights = jnp.asarray(targets), jnp.asarray(weights)

  @jax.jit
  def both(x, matrix):
    sums, pull = jax.vjp(
      lambda x, m: cross_entropy(x, m, targets, weights, spec), x, matrix
    )
    return sums, pull(jax.tree.map(jnp.ones_like, sums))

  return both(x, matrix)


SHIFTS = 'zero', 'largest'


def cases():
  """All together take long; a fifth of them has every value of every option."""
  options = itertools.product(
    [0, 1, 4, 7, 14, 100],  # tokens of a chunk, of 14
    SHIFTS,
    [0.0, 0.3],
    [False, True],
  )
  for i, case in enumerate(options):
    yield pytest.param(*case, marks=[pytest.mark.long] if i % 5 else [])


@pytest.mark.parametrize(
  ('chunk', 'shift', 'z_loss', 'vocab_first'), list(cases())
)
def test_values_and_gradients_are_those_of_all_logits_at_once(
  chunk, shift, z_loss, vocab_first
):
  check(LossSpec(chunk, z_loss, vocab_first=vocab_first, shift=shift))


@pytest.mark.parametrize('chunk', [0, 4])
@pytest.mark.parametrize('shift', SHIFTS)
def test_and_those_of_capped_logits(chunk, shift):
  check(LossSpec(chunk, z_loss=0.3, softcap=1.5, shift=shift))


def check(spec):
  x, matrix, targets = arrays()
  total = functools.partial(
    reference,
    targets=targets,
    weights=WEIGHTS,
    z_loss=spec.z_loss,
    softcap=spec.softcap,
  )
  with jax.enable_x64(True):
    sums, (d_x, d_matrix) = run(
      x,
      matrix.T if spec.vocab_first else matrix,
      targets,
      WEIGHTS,
      spec,
    )
  np.testing.assert_allclose(sums[:3], total(x, matrix), rtol=1e-12)
  assert sums.weight == WEIGHTS.sum()
  np.testing.assert_allclose(
    d_x, derivative(lambda x: total(x, matrix)[0], x), rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(
    d_matrix.T if spec.vocab_first else d_matrix,
    derivative(lambda m: total(x, m)[0], matrix),
    rtol=0,
    atol=1e-12,
  )


def test_the_value_alone_is_the_one_beside_the_gradient():
  x, matrix, targets = arrays()
  arguments = (x.astype(np.float32), matrix.astype(np.float32), targets)
  spec = LossSpec(chunk=4, z_loss=0.1)
  alone = jax.jit(lambda *a: cross_entropy(*a, spec))(*arguments, WEIGHTS)
  beside, _ = run(*arguments, WEIGHTS, spec)
  np.testing.assert_allclose(alone, beside, rtol=1e-6)


@pytest.mark.parametrize('chunk', [0, 4])
@pytest.mark.parametrize('shift', SHIFTS)
def test_tokens_without_weight_have_no_part_in_anything(shift, chunk):
  x, matrix, targets = arrays()
  other, _, others = arrays(1)
  counted = WEIGHTS > 0
  spec = LossSpec(chunk, 0.3, shift=shift)
  first = run(x, matrix, targets, WEIGHTS, spec)
  x = np.where(counted[..., None], x, 100 * other)
  second = run(x, matrix, np.where(counted, targets, others), WEIGHTS, spec)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert not np.any(np.asarray(first[1][0])[~counted])


@pytest.mark.parametrize('chunk', [0, 4])
def test_a_batch_of_padding_alone_costs_nothing(chunk):
  x, matrix, targets = arrays()
  sums, gradients = run(
    x, matrix, targets, np.zeros((B, T)), LossSpec(chunk, 0.3)
  )
  assert [float(value) for value in sums] == [0.0] * 4
  assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize('shift', SHIFTS)
def test_logits_that_exp_cannot_hold_are_no_trouble(shift):
  x = np.full((1, 2, 1), 1e4, np.float32)
  matrix = np.array([[1.0, -1.0, 0.5]], np.float32)
  targets, weights = np.array([[0, 2]]), np.ones((1, 2))
  spec = LossSpec(shift=shift)
  sums, (d_x, d_matrix) = run(x, matrix, targets, weights, spec)
  # The first is certain and right; the second certain, and wrong by 5000.
  np.testing.assert_allclose(sums.nll, 2500, rtol=1e-6)
  np.testing.assert_allclose(d_x.ravel(), [0, 0.25], atol=1e-6)
  np.testing.assert_allclose(d_matrix, [[5e3, 0, -5e3]], rtol=1e-6)


@pytest.mark.parametrize(
  ('shift', 'first', 'second'),
  [
    ('zero', 300.0, -300.0),
    ('zero', -300.0, -300.0),
    ('zero', 1.0, 3e4),
    ('largest', 300.0, -300.0),
  ],
)
def test_nor_where_only_a_part_of_the_vocabulary_has_them(shift, first, second):
  """Two devices, of which each may need another shift than the other."""
  x, matrix, targets = arrays()
  matrix = np.concatenate([first + matrix[:, :5], second + matrix[:, 5:10]], 1)
  x, targets = np.abs(x), targets % 10
  spec = LossSpec(z_loss=0.1, vocab_axis='half', shift=shift)

  def both(x, part):
    return local_loss(x, part, targets, jnp.asarray(WEIGHTS), spec, True)

  run = jax.vmap(both, in_axes=(None, 0), axis_name='half')
  with jax.enable_x64(True):
    halves = np.stack([matrix[:, :5], matrix[:, 5:]])
    sums, gradients = jax.jit(run)(x, halves)
  logits = x @ matrix
  lse = np.logaddexp.reduce(logits, axis=2)
  own = np.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
  share = WEIGHTS / WEIGHTS.sum()
  for nll, z in zip(sums.nll, sums.z, strict=True):
    np.testing.assert_allclose(nll, np.sum(share * (lse - own)), rtol=1e-9)
    np.testing.assert_allclose(z, np.sum(share * lse**2), rtol=1e-9)
  d_logits = np.exp(logits - lse[..., None]) * (1 + 0.2 * lse)[..., None]
  d_logits -= np.eye(10)[targets]
  d_logits *= share[..., None]
  d_matrix = np.einsum('btd,btv->dv', x, d_logits)
  found = np.concatenate(list(gradients.matrix), axis=1)
  atol = 1e-9 * np.abs(d_matrix).max()
  np.testing.assert_allclose(found, d_matrix, rtol=0, atol=atol)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('shift', SHIFTS)
def test_what_is_no_number_ends_and_shows(shift, value):
  x, *rest = arrays()
  x[0, 0, 0] = value
  sums, _ = run(x, *rest, WEIGHTS, LossSpec(chunk=4, shift=shift))
  assert not np.isfinite(sums.total)


def test_what_is_left_of_a_certain_target_is_not_rounded_away():
  """Its share is nearly one in bfloat16, and the rest of it is the gradient."""
  x, targets = jnp.ones((1, 1, 1), jnp.bfloat16), np.zeros((1, 1), np.int32)
  matrix = np.array([[9.0, 0.0, 0.5]], np.float32)
  spec = LossSpec(shift='zero')
  _, (_, d_matrix) = run(x, matrix, targets, np.ones((1, 1)), spec)
  share = np.exp(matrix[0].astype(np.float64))
  share /= share.sum()
  expected = share - np.eye(3)[0]
  eps = float(jnp.finfo(jnp.bfloat16).eps)
  np.testing.assert_allclose(d_matrix[0], expected, rtol=eps)


@pytest.mark.parametrize('shift', SHIFTS)
def test_bfloat16_is_multiplied_as_it_is_and_summed_in_float32(shift):
  """Many tokens of one kind: a narrow sum would stop to grow."""
  rng = np.random.default_rng(0)
  tokens = 4096
  x = np.ones((1, tokens, 1), jnp.bfloat16)
  matrix = rng.normal(size=(1, V)).astype(np.float32)
  targets = np.zeros((1, tokens), np.int32)
  spec = LossSpec(chunk=64, shift=shift)
  sums, (d_x, d_matrix) = run(x, matrix, targets, np.ones((1, tokens)), spec)
  assert d_x.dtype == jnp.bfloat16
  assert d_matrix.dtype == jnp.float32
  narrow = matrix.astype(jnp.bfloat16).astype(np.float64)
  share = np.exp(narrow[0]) / np.exp(narrow[0]).sum()
  np.testing.assert_allclose(sums.nll, -np.log(share[0]), rtol=1e-6)
  eps = float(jnp.finfo(jnp.bfloat16).eps)  # of d_logits, before the sum
  np.testing.assert_allclose(
    d_matrix[0], share - np.eye(V)[0], rtol=0, atol=eps
  )


def test_the_gradient_takes_what_comes_from_above():
  x, *rest = (jnp.asarray(a) for a in (*arrays(), WEIGHTS))

  def total(x, scale):
    return scale * cross_entropy(x, *rest).total

  once, thrice = (jax.grad(total)(x, scale) for scale in (1.0, 3.0))
  np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


@pytest.mark.parametrize(
  ('tokens', 'vocab', 'chunk', 'expected'),
  [
    (100, 1000, 0, 100),  # at most all of them
    (100, 1000, 30, 30),
    (1 << 20, 152_064, 0, 2048),  # 2048 x 152064 x 4 bytes: 1.2 GB of logits
    (1 << 20, 257, 0, 1 << 20),
    (1 << 20, 1 << 30, 0, 256),  # never so few that a matmul starves
  ],
)
def test_a_chunk_follows_the_vocabulary_unless_told(
  tokens, vocab, chunk, expected
):
  assert chunk_of(tokens, vocab, LossSpec(chunk)) == expected
