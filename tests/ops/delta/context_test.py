"""The delta rule over a sequence split over devices: equal to one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gated_jax.ops.attention.context import zigzag
from gated_jax.ops.delta import context
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.convolution import convolve
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.norm import normalize

PARTS, LENGTH = 4, 32
AXIS = 'context'


def split(function, *arrays):
  """`function` on each device's two parts, as rows, over whole arrays."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:PARTS]), (AXIS,))
  order = zigzag(LENGTH, PARTS)

  def here(*arrays):
    return context.from_rows(function(*map(context.as_rows, arrays)))

  spec = PartitionSpec(None, AXIS)
  specs = tuple(spec for _ in arrays)
  sharded = jax.shard_map(
    here, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False
  )
  found = jax.jit(sharded)(*(x[:, order] for x in arrays))
  return found[:, np.argsort(order)]


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.long
def test_outputs_and_gradients_are_those_of_one_device():
  query, key = (random(2, LENGTH, 2, 4, seed=i) for i in (0, 1))
  inputs = Inputs(
    query,
    np.asarray(normalize(key, 1.0)),
    random(2, LENGTH, 4, 3, seed=2),
    -0.1 * np.abs(random(2, LENGTH, 4, seed=3)),
    jax.nn.sigmoid(random(2, LENGTH, 4, seed=4)),
  )
  # Documents end within parts, between them, and after several.
  first = np.isin(np.arange(LENGTH), [3, 16]) & np.array([[True], [False]])
  slope = random(*inputs.value.shape, seed=5)

  def whole(inputs):
    output = rule.delta_rule(inputs, None, first).output
    return jnp.sum(output * slope), output

  def in_parts(inputs):
    def part(first, *arrays):
      return context.delta_rule_in_parts(Inputs(*arrays), first, AXIS)

    output = split(part, first, *inputs)
    return jnp.sum(output * slope), output

  (found, slopes), (expected, expected_slopes) = (
    jax.jit(
      lambda x, f=f: (f(x)[1], jax.grad(f, has_aux=True)(x)[0]),
    )(inputs)
    for f in (in_parts, whole)
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for a, b in zip(slopes, expected_slopes, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_part_is_filtered_with_the_inputs_before_it():
  x, filters = random(2, LENGTH, 3), random(4, 3, seed=1)
  segments = np.repeat([[1, 2, 3], [4, 4, 4]], [4, 9, 19], axis=1)

  def part(x, segments):
    before = context.previous_parts(segments[:, -1], AXIS)
    first = rule.first_tokens(segments, before)
    history = context.previous_parts(x[:, -3:], AXIS)
    return convolve(x, filters, history, first)

  expected = convolve(x, filters, None, rule.first_tokens(segments))
  np.testing.assert_allclose(split(part, x, segments), expected, atol=1e-6)
