"""The gated delta rule over a sequence split over devices, inside shard_map.

A device holds two parts of the sequence, in the order of
`gated_jax/ops/attention/context.py`. What a part does to the state that it
starts from is linear:

    S' = M S + N        o = o_N + O_M S

M, N, O_M and o_N take one call of the rule: columns of a state do not meet, so
that a state [I | 0] with values [0 | v] becomes [M | N]. Devices then exchange
M and N, each carries the state through the parts before its own, and adds what
its tokens read of that. The filter before the rule needs the last inputs of
the part before, and a document's first token is told by the last number there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.rule import delta_rule

# Both parts of a device, one after the other, become rows of a batch.


def as_rows(x: Float[Array, 'B T ...']) -> Float[Array, 'b t ...']:
  """[B, 2 t, ...] as [2 B, t, ...]: the first parts, then the second ones."""
  return jnp.concatenate(jnp.split(x, 2, axis=1), axis=0)


def from_rows(x: Float[Array, 'b t ...']) -> Float[Array, 'B T ...']:
  """The inverse of `as_rows`."""
  return jnp.concatenate(jnp.split(x, 2, axis=0), axis=1)


def previous_parts(
  x: Float[Array, 'b ...'], axis: str
) -> Float[Array, 'b ...']:
  """Gives each part what the part before it has; zeros to the first.

  Args:
    x: of this device's parts, as rows.
    axis: the mesh axis that splits the sequence.
  """
  every = _in_order(x, axis)
  before = jnp.concatenate([jnp.zeros_like(every[:1]), every[:-1]])
  return _own(before, axis)


def delta_rule_in_parts(
  inputs: Inputs,
  first: Bool[Array, 'b t'] | None,
  axis: str,
  implementation: str = 'auto',
) -> Float[Array, 'b t N V']:
  """Computes what the tokens of this device's parts read.

  Args:
    inputs: of this device's parts, as rows.
    first: True at the first token of a document; None: nowhere.
    axis: the mesh axis that splits the sequence.
    implementation: of the rule.
  """
  width, channels = inputs.key.shape[3], inputs.value.shape[3]
  zeros = jnp.zeros((*inputs.value.shape[:3], width), inputs.value.dtype)
  both = inputs._replace(value=jnp.concatenate([zeros, inputs.value], axis=3))
  empty = both.empty_state()
  identity = jnp.eye(width, width + channels, dtype=empty.dtype)
  output, state = delta_rule(both, empty + identity, first, implementation)
  passed, own = jnp.split(output, [width], axis=3)
  states = _carry(_in_order(state, axis), width)
  entering = _own(states, axis)
  product = jax.lax.Precision.HIGHEST
  return own + jnp.einsum(
    'BTNH,BNHV->BTNV', passed, entering, precision=product
  )


def _carry(
  parts: Float[Array, 'P B N H W'], width: int
) -> Float[Array, 'P B N H V']:
  """The state that enters each part, from what every part does to one."""

  def step(state: Array, part: Array) -> tuple[Array, Array]:
    scale, more = jnp.split(part, [width], axis=-1)
    product = jax.lax.Precision.HIGHEST
    return jnp.matmul(scale, state, precision=product) + more, state

  first = jnp.zeros_like(parts[0][..., width:])
  return jax.lax.scan(step, first, parts)[1]


def _in_order(x: Float[Array, 'b ...'], axis: str) -> Float[Array, 'P B ...']:
  """Gathers what every part of the sequence has, first part first."""
  halves = jnp.stack(jnp.split(x, 2, axis=0))
  every = jax.lax.all_gather(halves, axis)
  # Device i has parts i and 2 P - 1 - i.
  return jnp.concatenate([every[:, 0], every[::-1, 1]])


def _own(every: Float[Array, 'P B ...'], axis: str) -> Float[Array, 'b ...']:
  """This device's rows of what every part has."""
  here = jax.lax.axis_index(axis)
  places = jnp.stack([here, every.shape[0] - 1 - here])
  return jnp.concatenate(list(every[places]), axis=0)
