"""A sequence split over devices is attended to as one device would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gated_jax.ops.attention import context
from gated_jax.ops.attention import xla
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from tests.quick import QUICK

PARTS = 4
CASES = {
  'wide values': Case(T=32, H=4, V=6, gate='elementwise'),
  'narrow values': Case(T=32, H=6, V=4, gate='headwise', segments='packed'),
  'window': Case(T=32, H=4, V=6, window=7, gate='headwise'),
  'no gate': Case(T=32, H=4, segments='packed'),
}


def run(attend, case):
  """Output, lse and gradients of one attention, compiled."""
  arrays = Inputs(**case.arrays())
  weights = jnp.asarray(
    np.random.default_rng(1).normal(size=case.output_shape), jnp.float32
  )

  def total(inputs):
    output, lse = attend(inputs, case.masking().query_segments)
    return jnp.sum(output * weights) + jnp.sum(jnp.sin(lse)), (output, lse)

  run = jax.value_and_grad(total, has_aux=True)
  return jax.jit(run, compiler_options=QUICK)(arrays)


@pytest.mark.parametrize(
  ('name', 'skips'),
  [
    ('wide values', False),
    pytest.param('narrow values', True, marks=pytest.mark.long),
    pytest.param('no gate', True, marks=pytest.mark.long),
    ('window', False),
  ],
)
def test_devices_with_two_chunks_each_compute_the_whole(name, skips):
  case = CASES[name]
  order = context.zigzag(case.T, PARTS)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:PARTS]), ('sequence',))
  rows = PartitionSpec(None, 'sequence')

  def split(inputs, ids):
    part = functools.partial(
      context.attend, xla.attend, spec=case.spec, axis='sequence', skips=skips
    )
    sharded = jax.shard_map(
      lambda inputs, ids: tuple(part(inputs, Masking(ids, ids))),
      mesh=mesh,
      in_specs=rows,
      out_specs=(rows, PartitionSpec(None, None, 'sequence')),
      check_vma=False,
    )
    moved = jax.tree.map(lambda x: x[:, order], (inputs, ids))
    output, lse = sharded(*moved)
    back = np.argsort(order)
    return output[:, back], lse[:, :, back]

  def whole(inputs, ids):
    return xla.attend(inputs, Masking(ids, ids), case.spec)

  found, expected = run(split, case), run(whole, case)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_order_gives_every_device_an_early_and_a_late_chunk():
  order = context.zigzag(8, 2)
  np.testing.assert_array_equal(order, [0, 1, 6, 7, 2, 3, 4, 5])
  np.testing.assert_array_equal(context.zigzag(5, 1), range(5))
  with pytest.raises(ValueError, match='length of 6 must be a multiple of 4'):
    context.zigzag(6, 2)
