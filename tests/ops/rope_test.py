"""Rotary embedding against formulas in float64 and against Hugging Face."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gated_jax.config import RopeConfig
from gated_jax.ops.rope import rotate
from gated_jax.ops.rope import rotation

EPS = float(np.finfo(np.float32).eps)
HEAD = 32


def yarn(**changes) -> RopeConfig:
  return RopeConfig(scaling='yarn', **changes)


CASES = {
  'plain': RopeConfig(),
  'base_1e6': RopeConfig(base=1e6),
  'base_1e7_quarter': RopeConfig(base=1e7, fraction=0.25),
  'linear': RopeConfig(base=1e6, scaling='linear', factor=8.0),
  'llama3': RopeConfig(
    base=5e5, scaling='llama3', factor=8.0, original_length=64
  ),
  'proportional': RopeConfig(
    base=1e6, fraction=0.4, scaling='proportional', factor=2.0
  ),
  'yarn': yarn(base=1e6, factor=4.0, original_length=32768),
  'yarn_half': yarn(base=1e6, fraction=0.5, factor=4.0, original_length=32768),
  'yarn_not_truncated': yarn(
    base=150_000.0, factor=32.0, original_length=4096, truncate=False
  ),
  'yarn_mscale': yarn(
    factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.5
  ),
  'yarn_one_mscale': yarn(factor=40.0, original_length=4096, mscale=0.7),
  'yarn_attention_factor': yarn(
    factor=16.0,
    original_length=2048,
    attention_factor=1.2,
    beta_fast=64.0,
    beta_slow=2.0,
  ),
  # The range of pairs is cut to [0, 0], and to [14, 31].
  'yarn_short': yarn(factor=2.0, original_length=4),
  'yarn_long': yarn(factor=2.0, original_length=2**31, beta_fast=1e5),
}

# attention_scaling, then inv_freq[::3], of Qwen3NextRotaryEmbedding with
# head_dim 32 in transformers 5.24.0 (torch 2.13.0); llama3 of LlamaRotaryEmbedding.
GOLDEN = {
  'plain': (1.0, 1.0, 0.17782794, 0.031622779, 0.0056234132, 0.001, 1.7782794e-4),
  'base_1e6': (1.0, 1.0, 0.074989416, 0.0056234132, 4.2169649e-4, 3.1622774e-5, 2.3713737e-6),
  'base_1e7_quarter': (1.0, 1.0, 5.6234135e-6),
  'linear': (1.0, 0.125, 0.009373677, 7.0292666e-4, 5.2712061e-5, 3.9528468e-6, 2.9642172e-7),
  'llama3': (1.0, 1.0, 0.010674638, 0.00091158313, 7.7846555e-05, 6.6478697e-06, 5.6770881e-07),
  'yarn': (1.13862944, 1.0, 0.074989416, 0.0047799014, 1.6867858e-4, 7.9056936e-6, 5.9284343e-7),
  'yarn_half': (1.13862944, 1.0, 0.0042175599, 7.9056936e-6),
  'yarn_not_truncated': (1.34657359, 1.0, 0.10702442, 0.0067949593, 3.8308812e-5, 4.0999785e-6, 4.3879785e-7),
  'yarn_mscale': (1.15572199, 1.0, 0.17782794, 0.027218176, 0.0024903687, 2.4999999e-5, 4.4456983e-6),
  'yarn_one_mscale': (1.36888795, 1.0, 0.17782794, 0.027218176, 0.0024903687, 2.4999999e-5, 4.4456983e-6),
  'yarn_attention_factor': (1.2, 1.0, 0.1540117, 0.014682003, 3.5146333e-4, 6.2500003e-5, 1.1114246e-5),
}  # fmt: skip

# arange(1, 33) / 8 at position 100, turned by the same version.
ROTATED = {
  'plain': [1.183817, 0.9338233, -0.1207657, 2.430585, 0.9036359, 2.278175, -0.8153469, -3.141655, -2.021757, -0.6752861, 0.2572513, 0.8572226, 1.254986, 1.536467, 1.751545, 1.928556, 1.769132, 2.062274, 2.401388, 0.7695825, -2.542576, 1.71316, -2.892483, 0.3605596, 2.6351, 3.41599, 3.635254, 3.710144, 3.76912, 3.84243, 3.932345, 4.034931],
  'base_1e7_quarter': [0.4242684, -0.7854138, 0.3471472, 0.4994376, 0.4756536, 0.09013991, 0.8864191, 1.000281, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2.0, 2.125, 2.25, 2.375, 2.5, 2.625, 2.75, 2.875, 3.0, 3.125, 3.25, 3.375, 3.5, 3.625, 3.75, 3.875, 4.0],
  'yarn': [1.347929, 2.419181, 2.574167, -2.47113, -0.6496693, -2.842771, -0.6211861, 0.5585542, 1.083418, 1.360667, 1.548516, 1.70047, 1.847009, 1.991178, 2.13431, 2.276989, 2.014386, -0.8899492, 0.932159, 1.523357, -3.002982, 1.566056, 3.364957, 3.557076, 3.623254, 3.724026, 3.849796, 3.988398, 4.128994, 4.270524, 4.412489, 4.554653],
}  # fmt: skip

# Beyond 2^24 a float32 cannot hold the position itself.
POSITIONS = [0, 1, 2, 3, 17, 1000, 4095, 32767, 131071, 999_999, 2**24 + 1, -9]


def formula(spec: RopeConfig, positions) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines in float64, a pair at a time, factor inside."""
  channels = round(HEAD * spec.fraction)
  turning = channels // 2
  if spec.scaling == 'proportional':
    channels, turning = HEAD, int(HEAD / 2 * spec.fraction)
  columns = []
  for pair in range(channels // 2):
    frequency = math.exp(-2 * pair / channels * math.log(spec.base))
    if spec.scaling in ('linear', 'proportional'):
      frequency /= spec.factor
    if pair >= turning:
      frequency = 1e-300  # it stands still
    wavelength = 2 * math.pi / frequency
    if spec.scaling == 'llama3':
      shortest, longest = (
        spec.original_length / turns
        for turns in (spec.high_turns, spec.low_turns)
      )
      if wavelength > longest:
        frequency /= spec.factor
      elif wavelength > shortest:
        smooth = (spec.original_length / wavelength - spec.low_turns) / (
          spec.high_turns - spec.low_turns
        )
        frequency *= (1 - smooth) / spec.factor + smooth
    if spec.scaling == 'yarn':
      # A wavelength of L / turns tokens belongs to this (fractional) pair.
      low, high = (
        channels
        / 2
        * math.log(spec.original_length / turns / 2 / math.pi, spec.base)
        for turns in (spec.beta_fast, spec.beta_slow)
      )
      if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, channels - 1)
      ramp = (pair - low) / (high - low) if high != low else float(pair > low)
      ramp = min(max(ramp, 0.0), 1.0)
      frequency *= (1 - ramp) + ramp / spec.factor
    columns.append(np.asarray(positions, np.float64) * frequency)
  angles = np.stack(columns, -1)
  factor = 1.0
  if spec.scaling == 'yarn':
    log = math.log(spec.factor) / 10
    factor = 1 + log
    if spec.mscale and spec.mscale_all_dim:
      factor = (1 + spec.mscale * log) / (1 + spec.mscale_all_dim * log)
    factor = spec.attention_factor or factor
  return factor * np.cos(angles), factor * np.sin(angles)


@pytest.mark.parametrize('name', CASES)
def test_rotation_is_that_of_float64_at_any_position(name):
  spec = CASES[name]
  positions = jnp.asarray([POSITIONS, POSITIONS[::-1]])
  found = jax.jit(lambda p: rotation(p, HEAD, spec))(positions)
  assert found.cos.dtype == found.sin.dtype == jnp.float32
  # Angles within (-pi, pi) carry a few roundings of their own size.
  for value, expected in zip(found, formula(spec, positions), strict=True):
    np.testing.assert_allclose(value, expected, rtol=0, atol=5 * EPS)


@pytest.mark.parametrize('name', GOLDEN)
def test_frequencies_and_factor_are_those_recorded(name):
  factor, *frequencies = GOLDEN[name]
  cos, sin = (
    x[0, 0, ::3] for x in rotation(jnp.ones((1, 1), int), HEAD, CASES[name])
  )
  np.testing.assert_allclose(np.hypot(cos, sin), factor, 2 * EPS)
  np.testing.assert_allclose(np.arctan2(sin, cos), frequencies, 5 * EPS)


@pytest.mark.parametrize('name', ROTATED)
def test_rotated_vector_is_the_one_recorded(name):
  x = jnp.arange(1, HEAD + 1, dtype=jnp.float32).reshape(1, 1, 1, HEAD) / 8
  turn = rotation(jnp.full((1, 1), 100), HEAD, CASES[name])
  # The recording's angles of up to 100 radians are float32, too.
  atol = 4 * 100 * EPS
  np.testing.assert_allclose(
    rotate(x, turn)[0, 0, 0], ROTATED[name], rtol=0, atol=atol
  )


def hugging_face(spec: RopeConfig):
  """Their module for the same settings; it knows partial rotary as well."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.qwen3_next import modeling_qwen3_next

  settings = {
    'rope_theta': spec.base,
    'rope_type': 'default' if spec.scaling == 'none' else spec.scaling,
    'partial_rotary_factor': spec.fraction,
  }
  if spec.scaling != 'none':
    settings['factor'] = spec.factor
  if spec.scaling == 'yarn':
    settings |= {
      'original_max_position_embeddings': spec.original_length,
      'beta_fast': spec.beta_fast,
      'beta_slow': spec.beta_slow,
      'attention_factor': spec.attention_factor or None,
      'mscale': spec.mscale,
      'mscale_all_dim': spec.mscale_all_dim,
      'truncate': spec.truncate,
    }
  if spec.scaling == 'llama3':
    settings |= {
      'original_max_position_embeddings': spec.original_length,
      'low_freq_factor': spec.low_turns,
      'high_freq_factor': spec.high_turns,
    }
  config = transformers.Qwen3NextConfig(
    head_dim=HEAD, rope_parameters=settings, max_position_embeddings=131_072
  )
  embedding = modeling_qwen3_next.Qwen3NextRotaryEmbedding(config)
  return embedding, modeling_qwen3_next.apply_rotary_pos_emb


@pytest.mark.parametrize('name', CASES)
def test_agrees_with_hugging_face(name):
  spec = CASES[name]
  embedding, apply = hugging_face(spec)
  import torch

  positions = np.array([[0, 1, 17, 1000, 4095, 32767, 131071]])
  rng = np.random.default_rng(0)
  q = rng.standard_normal((1, positions.size, 4, HEAD), np.float32)
  k = rng.standard_normal((1, positions.size, 2, HEAD), np.float32)
  cos, sin = embedding(torch.from_numpy(q), torch.from_numpy(positions))
  expected = apply(
    torch.from_numpy(q), torch.from_numpy(k), cos, sin, unsqueeze_dim=2
  )
  turn = rotation(jnp.asarray(positions), HEAD, spec)
  # Their angle is a float32 product: it is off by its own rounding and by
  # that of the frequency, each up to eps / 2 of up to `position` radians.
  slack = (2 * positions[0] + 16) * EPS
  for x, theirs in zip((q, k), expected, strict=True):
    off = np.abs(rotate(jnp.asarray(x), turn) - theirs.numpy()).max((0, 2, 3))
    assert (off <= slack * np.abs(x).max() * 2).all(), off


@pytest.mark.parametrize('name', ['base_1e7_quarter', 'yarn'])
@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.integers(0, 2**20), st.integers(0, 2**20), st.integers(0, 2**20)
)
def test_scores_depend_on_relative_positions_alone(name, i, j, shift):
  vectors = np.random.default_rng(1).standard_normal((2, HEAD), np.float32)
  turned = []
  for x, position in zip(vectors, (i, j), strict=True):
    turn = rotation(
      jnp.asarray([[position, position + shift]]), HEAD, CASES[name]
    )
    both = rotate(jnp.tile(x, (1, 2, 1, 1)), turn)
    turned.append(np.asarray(both[0, :, 0], np.float64))
  score, shifted = (turned[0] * turned[1]).sum(-1)
  size = np.linalg.norm(turned[0][0]) * np.linalg.norm(turned[1][0])
  # Four vectors, each of them as accurate as the first test asks.
  np.testing.assert_allclose(shifted, score, rtol=0, atol=4 * 6 * EPS * size)


def test_channels_beyond_the_fraction_and_position_zero_stay_as_they_are():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, HEAD))
  spec = RopeConfig(fraction=0.25)
  turned = rotate(x, rotation(jnp.arange(6).reshape(2, 3), HEAD, spec))
  np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
  np.testing.assert_array_equal(turned[0, 0], x[0, 0])
  assert (turned[1] != x[1])[..., :8].all()


def test_narrow_arrays_are_turned_in_float32_and_rounded_once():
  x = jax.random.normal(jax.random.key(0), (1, 5, 2, HEAD), jnp.bfloat16)
  turn = rotation(jnp.arange(5)[None] * 7, HEAD, RopeConfig())
  turned = rotate(x, turn)
  assert turned.dtype == jnp.bfloat16
  wide = rotate(x.astype(jnp.float32), turn)
  np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


def test_gradient_turns_back():
  x, g = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, HEAD))
  turn = rotation(jnp.arange(5)[None] * 7, HEAD, RopeConfig(fraction=0.5))
  _, pull = jax.vjp(lambda x: rotate(x, turn), x)
  back = rotate(g, turn._replace(sin=-turn.sin))
  np.testing.assert_allclose(pull(g)[0], back, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'fraction': 0.1}, r'fraction=0\.1 .* even number .* not 3'),
    ({'fraction': 0.01}, 'not 0'),
    ({'scaling': 'ntk'}, "scaling='ntk'"),
    ({'scaling': 'yarn'}, 'needs rope.original_length, .* not 0'),
    (
      {'scaling': 'yarn', 'original_length': 9, 'beta_slow': 0.0},
      r'beta_slow=0\.0',
    ),
  ],
)
def test_what_has_no_meaning_is_refused_with_its_value(changes, message):
  with pytest.raises(ValueError, match=message):
    rotation(jnp.zeros((1, 1), int), HEAD, RopeConfig(**changes))
