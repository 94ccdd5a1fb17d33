"""The TPU kernels' cutting: every pair once, any number of parts, real sizes.

What they compute is the contract test's; here blocks are far smaller than
the table's, so that every path through a long sequence is short enough to be
interpreted.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.ops.attention import pallas_tpu
from gated_jax.ops.attention import pallas_tpu_blocks as cut
from gated_jax.ops.attention import xla
from gated_jax.ops.attention.cases import Case

SMALL = cut.Blocks(
  queries=256,
  keys=128,
  strip=128,
  resident=256,
  back_queries=128,
  back_keys=256,
  back_strip=128,
  back_resident=256,
)


def gradients(attend, case, dtype_out=jnp.float32):
  arrays, masking = case.arrays(), case.masking()
  shape = case.shapes['query']
  d = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

  def loss(arrays):
    output, lse = attend(
      arrays['query'],
      arrays['key'],
      arrays['value'],
      arrays.get('gate'),
      masking,
      case.spec,
    )
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    return jnp.sum(output * d) + jnp.sum(jnp.sin(lse)), (output, lse)

  run = jax.value_and_grad(loss, has_aux=True)
  (_, results), grads = jax.jit(
    run, compiler_options={'xla_backend_optimization_level': 0}
  )(arrays)
  return *results, grads


# More parts than one on both axes, in one call and, for the little dQ that
# `dq_mib` of these allows, in several.
LONG = {
  'causal': (Case(B=1, T=768, N=2, K=1, gate='elementwise'), {}),
  'headwise': (Case(B=1, T=512, N=2, K=2, gate='headwise'), {}),
  'window': (Case(B=1, T=768, N=1, K=1, window=300, gate='headwise'), {}),
  'short window': (Case(B=1, T=768, N=1, K=1, window=30), {}),
  'full': (Case(B=1, T=512, N=1, K=1, causal=False), {}),
  'segments': (Case(B=1, T=512, N=1, K=1, segments='blind'), {}),
  'more keys': (Case(B=1, T=256, S=768, N=1, K=1), {}),
  'more queries': (Case(B=1, T=768, S=256, N=1, K=1), {}),
  'ranges': (
    Case(B=1, T=512, N=2, K=1, H=128, gate='headwise'),
    {'dq_mib': 0.25},
  ),
  'window in ranges': (
    Case(B=1, T=768, N=1, K=1, H=128, window=300, gate='elementwise'),
    {'dq_mib': 0.25},
  ),
  'full in ranges': (
    Case(B=1, T=1024, N=1, K=1, H=128, causal=False),
    {'dq_mib': 0.25},
  ),
}


@pytest.mark.parametrize('name', LONG)
def test_long_sequences_are_the_sum_of_their_parts(name):
  case, blocks = LONG[name]

  def attend(*arguments):
    return pallas_tpu.attend(
      *arguments, blocks=dataclasses.replace(SMALL, **blocks), interpret=True
    )

  found = gradients(attend, case)
  expected = gradients(xla.attend, case)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
