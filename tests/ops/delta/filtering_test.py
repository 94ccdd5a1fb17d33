"""The kernel of the filters in interpret mode against plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.delta import filtering

# Four steps of two pieces, of which the last is padded; documents begin within
# pieces, at their ends, and nearer to one another than a filter is wide. None
# begins in two steps, of which one needs masks for the step after it.
LENGTH = 900
FIRST = (3, 4, 127, 128, 130, 769)
RNG = np.random.default_rng(0)


def arrays(dtype, rows=1, heads=1):
  """Inputs, filters, and the inputs before."""
  shapes = (rows, LENGTH, heads, 128), (4, heads, 128), (rows, 3, heads, 128)
  return tuple(jnp.asarray(RNG.normal(size=x), dtype) for x in shapes)


def first_tokens(rows):
  first = np.isin(np.arange(LENGTH), FIRST)[None]
  return jnp.asarray(np.concatenate([first, np.zeros_like(first)])[:rows])


def both_passes(function, given, slope):
  y, pull = jax.vjp(function, *given)
  return [y, *pull(slope.astype(y.dtype))]


CASES = [
  # Precision, tolerance, rows and heads, whether there are documents, scale.
  ('float32', 2e-6, (1, 1), True, 0.25),
  ('float32', 2e-6, (2, 2), True, 0.0),
  ('float32', 2e-6, (1, 1), False, 0.25),
  ('bfloat16', 8e-3, (2, 2), True, 0.25),
  ('bfloat16', 8e-3, (1, 1), False, 0.0),
]


@pytest.mark.parametrize(
  ('dtype', 'tolerance', 'sizes', 'documents', 'scale'),
  [
    pytest.param(*case, marks=pytest.mark.nightly if i else pytest.mark.long)
    for i, case in enumerate(CASES)
  ],
)
def test_values_and_gradients_are_those_of_plain_arrays(
  dtype, tolerance, sizes, documents, scale
):
  given = arrays(dtype, *sizes)
  slope = jnp.asarray(RNG.normal(size=given[0].shape), jnp.float32)
  first = first_tokens(sizes[0]) if documents else None

  def run(function, **options):
    def call(x, filters, history):
      return function(x, filters, (history, first), scale, **options)

    wide = options == {}
    arrays = [x.astype(jnp.float32) for x in given] if wide else given
    return both_passes(jax.jit(call), arrays, slope)

  expected = run(filtering.filtered_heads)
  found = run(filtering.by_kernel, interpret=True)
  names = ('output', 'x', 'filters', 'history')
  for name, y, reference in zip(names, found, expected, strict=True):
    assert y.dtype == dtype
    scale_of = np.abs(reference).max()
    off = np.abs(np.asarray(y, np.float32) - reference).max() / scale_of
    assert off <= tolerance, (name, off)


def test_it_refuses_what_it_cannot_do():
  x, filters, _ = arrays('float32')
  assert 'no whole 128' in filtering.refusal(x[..., :64], filters)
  assert 'float16' in filtering.refusal(x.astype('float16'), filters)
  assert 'wider than 8' in filtering.refusal(x, jnp.zeros((9, 2, 128)))
  assert not filtering.refusal(x, filters)
