"""What cuDNN is given so that its log-sum-exp has a gradient; on any device."""

import jax.numpy as jnp
import numpy as np

from gated_jax.ops.attention import cudnn


def test_the_row_sums_that_it_makes_are_less_by_the_gradient_of_the_sum():
  rng = np.random.default_rng(0)
  shape = B, T, N, _ = 2, 5, 3, 8
  output, d_output = rng.normal(size=(2, *shape)).astype(np.float32)
  d_output[0, 1, 2] = 0  # such a row has none to pass on
  d_lse = rng.normal(size=(B, N, T)).astype(np.float32)
  given = cudnn._for_gradient_of_lse(
    jnp.asarray(output), jnp.asarray(d_output), jnp.asarray(d_lse)
  )
  expected = (output * d_output).sum(-1) - d_lse.swapaxes(1, 2)
  expected[0, 1, 2] = 0
  sums = (np.asarray(given) * d_output).sum(-1)
  np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
