"""What every attention backend must do, against float64 NumPy matrices.

The reference below shares nothing with the package: softmax and its Jacobian
as matrices, one row and head at a time, derivatives of activations by a step
into the complex plane, which does not round. Kernels for devices that are not here run interpreted.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.attention import api
from gated_jax.ops.attention import masks
from gated_jax.ops.attention import vjp
from gated_jax.ops.attention import xla
from gated_jax.ops.attention.cases import CASES
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from tests.quick import QUICK

SMALL = {n: c for n, c in CASES.items() if not c.compile_only}

# What a backend cannot do, exactly. A backend that is not listed may refuse
# what it likes.
REFUSES = {
  'xla': {},
  'plain': {},
  'splash': {
    'offset': 'query offset',
    'offset_window': 'query offset',
    'f16': 'float16',
  },
  'pallas_tpu': {
    'offset': 'query offset',
    'offset_window': 'query offset',
    'f16': 'float16',
  },
}
# Cases that would show nothing new about splash, whose gate is that of
# `plain`; interpreting it takes seconds each.
SAME_FOR_SPLASH = (
  'full',
  'head_dim_odd',
  'head_dim_128',
  'bf16_rounded',
  'bf16_rounded_headwise',
  'cross_causal',
  'ungrouped',
  *(n for n in SMALL if '_times_' in n or '_plus_' in n),
)

# What every run asks of the own TPU kernels, and what `-m long` adds; the rest
# is nightly, for the same seconds. `pallas_tpu_test.py` has the long sequences.
OFTEN_FOR_PALLAS_TPU = (
  'odd_length',
  'cross',
  'one_kv_head',
  'head_dim_odd',
  'narrow_values',
  'bf16_rounded',
)
LONG_FOR_PALLAS_TPU = (
  'blind',
  'window_of_one',
  'packed_window',
  'bf16_headwise',
  'headwise_plus_softplus',
  'elementwise_times_silu',
  'blind_full',
  'one_token',
  'cross_longer_queries',
  'cross_window',
  'head_dim_256',
  'wide_values',
  'bf16_rounded_headwise',
  'elementwise_times_softplus',
  'elementwise_plus_silu',
  'headwise_times_ns_sigmoid',
  'headwise_times_identity',
)


# The reference.

ACTIVATIONS = {
  'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
  'silu': lambda x: x / (1 + np.exp(-x)),
  'identity': lambda x: x,
  'ns_sigmoid': lambda x: 0.5 + 0.5 / (1 + np.exp(-x)),
  'two_sigmoid': lambda x: 2 / (1 + np.exp(-x)),
  'softplus': lambda x: np.log1p(np.exp(x)),
}


def visible_matrix(case, masking, row):
  """Which keys the queries of one row see, as a 0/1 matrix."""
  t = np.arange(case.T)[:, None]
  s = np.arange(case.keys)[None, :]
  if masking.query_offset is not None:
    t = t + int(masking.query_offset[row])
  seen = np.ones((case.T, case.keys), bool)
  if case.causal:
    seen &= t >= s
  if case.window:
    seen &= s > t - case.window
  if masking.query_segments is not None:
    q = np.asarray(masking.query_segments[row])
    kv = np.asarray(masking.kv_segments[row])
    seen &= np.equal.outer(q, kv)
  return seen


def reference(case, arrays, masking, d_output, d_lse):
  """Output, lse and the gradients of sum(output d_output) + sum(lse d_lse)."""
  a = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
  scale = case.H**-0.5
  group = case.N // case.K
  act = ACTIVATIONS[case.activation]
  output = np.zeros(case.output_shape)
  lse = np.full((case.B, case.N, case.T), -np.inf)
  grads = {n: np.zeros(x.shape) for n, x in a.items()}
  for b in range(case.B):
    seen = visible_matrix(case, masking, b)
    some = seen.any(1)
    for n in range(case.N):
      q, k, v = (
        a['query'][b, :, n],
        a['key'][b, :, n // group],
        a['value'][b, :, n // group],
      )
      logits = np.where(seen, scale * q @ k.T, -np.inf)
      top = np.where(some, logits.max(1, initial=-1e300), 0.0)
      e = np.exp(logits - top[:, None])
      total = e.sum(1)
      p = e / np.where(some, total, 1.0)[:, None]
      y = p @ v
      lse[b, n, some] = np.log(total[some]) + top[some]
      d_y = d_output[b, :, n]
      if 'gate_logits' in a:
        g = a['gate_logits'][b, :, n]
        slope = act(g + 1e-30j).imag / 1e-30
        if case.additive:
          output[b, :, n] = y + act(g)
          d_g = d_y * slope
        else:
          output[b, :, n] = y * act(g)
          d_g = d_y * y * slope
          d_y = d_y * act(g)
        if case.gate == 'headwise':
          d_g = d_g.sum(1, keepdims=True)
        grads['gate_logits'][b, :, n] = d_g
      else:
        output[b, :, n] = y
      # Softmax's Jacobian is diag(p) - p p^T; the lse's gradient is p.
      d_p = d_y @ v.T
      d_logits = p * d_p - p * (p * d_p).sum(1, keepdims=True)
      d_logits += p * d_lse[b, n][:, None]
      grads['query'][b, :, n] = scale * d_logits @ k
      grads['key'][b, :, n // group] += scale * d_logits.T @ q
      grads['value'][b, :, n // group] += p.T @ d_y
  return output, lse, grads


# The backends.


@dataclasses.dataclass(frozen=True)
class PlainKernel:
  """The hand-written backward in plain arrays, behind xla's forward."""

  case: object

  def forward(self, query, key, value, masking):
    return xla.attend(Inputs(query, key, value), masking, self.case.spec)

  def backward(self, inputs, masking, d_output, lse, delta):
    case = self.case
    seen = masks.visible_keys(case.T, case.keys, masking, case.spec)
    if seen is None:
      seen = jnp.ones((1, 1, case.T, case.keys), bool)
    scale = case.H**-0.5
    return vjp.attention_backward(inputs, seen, d_output, lse, delta, scale)


def backend(name, case, masking=None):
  """A function of `Inputs` alone: a backend with the rest of a case."""
  masking = masking or case.masking()
  if name == 'plain':
    return lambda inputs: vjp.attend(
      PlainKernel(case), inputs, masking, case.spec
    )
  if name == 'cudnn' and jax.default_backend() != 'gpu':
    pytest.skip('cudnn needs an NVIDIA GPU')
  attend = api.BACKENDS[name].attend
  if 'interpret' in inspect.signature(attend).parameters:
    interpret = jax.default_backend() != 'tpu'
    attend = functools.partial(attend, interpret=interpret)
  return lambda inputs: attend(inputs, masking, case.spec)


NAMES = ['plain', *api.BACKENDS]


def evaluate(name, case, arrays, d_output, d_lse):
  """(output, lse, gradients), compiled."""
  attend = backend(name, case)

  def loss(arrays):
    result = attend(Inputs(**arrays))
    output = result.output.astype(result.lse.dtype)
    lse = jnp.where(jnp.isneginf(result.lse), 0.0, result.lse)
    total = jnp.sum(output * d_output) + jnp.sum(lse * d_lse)
    return total, result

  run = jax.value_and_grad(loss, has_aux=True)
  options = QUICK if jax.default_backend() == 'cpu' else {}
  (_, result), grads = jax.jit(run, compiler_options=options)(arrays)
  return result.output, result.lse, grads


def close(found, expected, dtype, what):
  """Relative error: of the whole in the 2-norm, and of the worst entry."""
  found = np.asarray(found, np.float64)
  eps = float(jnp.finfo(dtype).eps)
  assert found.shape == expected.shape, what
  np.testing.assert_array_equal(
    np.isneginf(found), np.isneginf(expected), err_msg=what
  )
  finite = np.isfinite(expected)
  found, expected = found[finite], expected[finite]
  assert np.isfinite(found).all(), what
  norm, top = np.linalg.norm(expected), np.abs(expected).max(initial=0.0)
  # Wide types sum over channels and keys; narrow ones round a few times.
  whole, worst = (2, 4) if eps > 1e-4 else (16, 64)
  # What should be zero may be a difference of numbers of size one.
  norm, top = max(norm, found.size**0.5 / 8), max(top, 1 / 8)
  error = found - expected
  assert np.linalg.norm(error) <= whole * eps * norm, what
  assert np.abs(error).max(initial=0.0) <= worst * eps * top, what


def gradients_of_results(case, seed=7):
  """Numbers to multiply output and lse with, for a scalar to differentiate."""
  rng = np.random.default_rng(seed)
  d_output = rng.normal(size=case.output_shape)
  # Representable, so that only the backend rounds.
  d_output = np.asarray(jnp.asarray(d_output, case.dtype), np.float64)
  d_lse = rng.normal(size=(case.B, case.N, case.T))
  return d_output, d_lse.astype(np.float32)


def check(name, case):
  arrays, masking = case.arrays(), case.masking()
  d_output, d_lse = gradients_of_results(case)
  output, lse, grads = evaluate(name, case, arrays, d_output, d_lse)
  expected = reference(case, arrays, masking, d_output, d_lse)
  assert output.dtype == case.dtype
  close(output, expected[0], case.dtype, 'output')
  # Products of narrow inputs are exact in float32, and so is their lse.
  wide = jnp.promote_types(case.dtype, jnp.float32)
  assert lse.dtype == wide
  close(lse, expected[1], wide, 'lse')
  for argument, gradient in grads.items():
    assert gradient.dtype == case.dtype
    close(gradient, expected[2][argument], case.dtype, argument)


def narrowed(name, case):
  """The case as cudnn takes it, which has no wide types."""
  if name == 'cudnn' and case.dtype == 'float32':
    return dataclasses.replace(case, dtype='bfloat16')
  return case


def pairs():
  """Every backend with every case, some of them marked as rarer."""
  for name in NAMES:
    for case_name in SMALL:
      marks = []
      if name == 'pallas_tpu' and case_name not in OFTEN_FOR_PALLAS_TPU:
        rarer = 'long' if case_name in LONG_FOR_PALLAS_TPU else 'nightly'
        marks = [getattr(pytest.mark, rarer)]
      elif name == 'splash' and case_name not in ('plain', 'packed', 'window'):
        marks = [pytest.mark.long]
      yield pytest.param(name, case_name, marks=marks)


@pytest.mark.parametrize('name, case_name', list(pairs()))
def test_backend_agrees_with_float64_matrices(name, case_name):
  if name == 'splash' and case_name in SAME_FOR_SPLASH:
    pytest.skip('nothing new about splash')
  if case_name in REFUSES.get(name, {}):
    pytest.skip('refused: the next test')
  try:
    check(name, narrowed(name, SMALL[case_name]))
  except NotImplementedError as e:
    if name in REFUSES:
      raise
    pytest.skip(str(e))


@pytest.mark.parametrize(
  'name, case_name, reason',
  [(n, c, r) for n, refused in REFUSES.items() for c, r in refused.items()],
)
def test_what_a_backend_cannot_do_it_refuses_by_name(name, case_name, reason):
  case = SMALL[case_name]
  with pytest.raises(NotImplementedError, match=f'{name} .* {reason}'):
    evaluate(name, case, case.arrays(), *gradients_of_results(case))


@pytest.mark.parametrize('name', api.BACKENDS)
@pytest.mark.parametrize(
  'masking, spec, reason',
  [
    (Masking(mask=jnp.ones((1, 1, 8, 8), bool)), {}, 'arbitrary mask'),
    (Masking(dropout_key=jax.random.key(0)), {'dropout': 0.5}, 'dropout'),
  ],
)
def test_masks_and_dropout_are_done_or_refused(name, masking, spec, reason):
  x = jnp.ones((1, 8, 1, 8), jnp.bfloat16)
  arguments = (Inputs(x, x, x), masking, AttentionSpec(**spec))
  on_gpu = jax.default_backend() == 'gpu'
  if name == 'xla' or (name == 'cudnn' and on_gpu and not spec):
    assert jnp.isfinite(api.BACKENDS[name].attend(*arguments).output).all()
  elif name == 'cudnn' and not on_gpu:
    with pytest.raises(NotImplementedError, match='needs an NVIDIA GPU'):
      api.BACKENDS[name].attend(*arguments)
  else:
    with pytest.raises(NotImplementedError, match=reason):
      api.BACKENDS[name].attend(*arguments)


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_the_same_call_twice_gives_the_same_bits(name):
  case = narrowed(name, SMALL['packed'])
  arguments = (case.arrays(), *gradients_of_results(case))
  once = evaluate(name, case, *arguments)
  again = evaluate(name, case, *arguments)
  jax.tree.map(np.testing.assert_array_equal, once, again)


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_64_bits_by_default_change_nothing(name):
  case = narrowed(name, dataclasses.replace(SMALL['packed_window'], B=1, T=64))
  masking = case.masking()
  with jax.enable_x64(True):
    assert jnp.arange(1).dtype == jnp.int64
    check(name, case)
    wide = [x.astype(jnp.int64) for x in (masking[0], masking[1])]
    attend = backend(name, case, Masking(*wide))
    assert (
      jax.eval_shape(attend, Inputs(**case.arrays())).output.dtype == case.dtype
    )


@pytest.mark.parametrize(
  'case_name',
  ['packed', 'offset_window', 'headwise_times_silu', 'elementwise_plus_silu'],
)
def test_the_hand_written_backward_is_exact_in_float64(case_name):
  case = dataclasses.replace(SMALL[case_name], dtype='float64')
  with jax.enable_x64(True):
    check('plain', case)


@pytest.mark.parametrize(
  'case_name', ['headwise_times_softplus', 'elementwise_plus_silu', 'blind']
)
def test_the_reference_has_the_gradients_of_its_own_values(case_name):
  case = dataclasses.replace(SMALL[case_name], B=1, T=7, H=4)
  masking = case.masking()
  arrays = {n: np.asarray(x, float) for n, x in case.arrays().items()}
  d_output, d_lse = gradients_of_results(case)

  def total(arrays):
    output, lse, _ = reference(case, arrays, masking, d_output, d_lse)
    seen = np.where(np.isneginf(lse), 0.0, lse)
    return (output * d_output).sum() + (seen * d_lse).sum()

  _, _, grads = reference(case, arrays, masking, d_output, d_lse)
  rng = np.random.default_rng(0)
  for name, array in arrays.items():
    direction = rng.normal(size=array.shape)
    up, down = (
      total({**arrays, name: array + step * direction})
      for step in (1e-5, -1e-5)
    )
    found = (grads[name] * direction).sum()
    np.testing.assert_allclose((up - down) / 2e-5, found, rtol=1e-6)


def forward_runs(policy):
  """How often attention's forward stands in the gradient's program."""
  case = SMALL['packed']
  arrays = case.arrays()
  attend = backend('splash', case)

  def loss(arrays):
    return jnp.sum(attend(Inputs(**arrays)).output)

  rematted = jax.checkpoint(loss, policy=policy)
  text = str(jax.make_jaxpr(jax.grad(rematted))(arrays))
  return text.count('name=splash_mha_fwd')


def test_remat_that_saves_the_two_names_runs_forward_once():
  names = jax.checkpoint_policies.save_only_these_names(
    vjp.OUTPUT_NAME, vjp.LSE_NAME
  )
  assert forward_runs(names) == 1
  assert forward_runs(jax.checkpoint_policies.nothing_saveable) == 2


@pytest.mark.parametrize(
  'causal, window, segments, expected',
  [
    (True, 0, None, ['1000', '1100', '1110', '1111']),
    (True, 2, None, ['1000', '1100', '0110', '0011']),
    (False, 0, None, ['1111', '1111', '1111', '1111']),
    (True, 0, [1, 1, 2, 0], ['1000', '1100', '0010', '0001']),
    (False, 0, [1, 2, 2, 1], ['1001', '0110', '0110', '1001']),
  ],
)
def test_masks_are_these_matrices(causal, window, segments, expected):
  ids = None if segments is None else jnp.array([segments])
  seen = masks.visible_keys(
    4, 4, Masking(ids, ids), AttentionSpec(causal=causal, window=window)
  )
  seen = np.ones((4, 4), bool) if seen is None else np.asarray(seen)
  rows = [''.join('01'[int(x)] for x in row) for row in seen.reshape(4, 4)]
  assert rows == expected
