"""The gated delta rule token by token, and the choice of how to compute it.

The state S [H, V] of a value head maps a key to what was stored under it. Each
token scales it by exp(g), then corrects what it says of the token's key by a
share beta of the error, then reads it by the query:

    S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = S^T q

A document's first token finds a state of zeros. A token that is padding has
beta = 0 and g = 0, which leaves the state as it is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.delta.chunks import by_chunks
from gated_jax.ops.delta.inputs import Inputs
from gated_jax.ops.delta.inputs import State
from gated_jax.ops.delta.pallas_tpu.call import by_kernel
from gated_jax.ops.delta.pallas_tpu.call import refusal


class Result(NamedTuple):
  """Holds what each token reads, and the state after the last token."""

  output: Float[Array, 'B T N V']  # float32
  state: State


def delta_rule(
  inputs: Inputs,
  state: State | None = None,
  first: Bool[Array, 'B T'] | None = None,
  implementation: str = 'auto',
) -> Result:
  """Reads and updates the state, token after token.

  A single token takes the recurrence, more take chunks: in plain arrays, or in
  TPU kernels. All differ by rounding alone.

  Args:
    inputs: of all tokens.
    state: before the first token; None: zeros.
    first: True at the first token of a document, where the state begins anew;
      None: all tokens belong to the document that the state has seen.
    implementation: 'chunks', 'pallas_tpu', or 'auto': kernels on a TPU where
      they can do the call.

  Raises:
    NotImplementedError: the kernels are asked for by name and cannot do this.
  """
  state = inputs.empty_state() if state is None else state
  if inputs.query.shape[1] == 1:
    return Result(*recurrence(inputs, state, first))
  if takes_kernels(implementation, refusal(inputs)):
    return Result(*by_kernel(inputs, state, first))
  return Result(*by_chunks(inputs, state, first))


def takes_kernels(implementation: str, refused: str) -> bool:
  """True where TPU kernels compute a call.

  Args:
    implementation: as the settings name it.
    refused: the reason why kernels cannot do this; '' where they can.
  """
  if implementation == 'auto':
    return jax.default_backend() == 'tpu' and not refused
  if implementation == 'pallas_tpu' and refused:
    raise NotImplementedError(f'the gated delta rule by pallas_tpu: {refused}')
  return implementation == 'pallas_tpu'


def check_platform(implementation: str, platform: str) -> None:
  """NotImplementedError where an implementation cannot run."""
  if implementation == 'pallas_tpu' and platform != 'tpu':
    raise NotImplementedError(
      f'delta.implementation={implementation!r} needs a TPU and this is a '
      f'{platform}'
    )


def recurrence(
  inputs: Inputs, state: State, first: Bool[Array, 'B T'] | None = None
) -> tuple[Float[Array, 'B T N V'], State]:
  """The rule as it is written above: one token at a time, nothing clever."""
  wide = state.dtype
  query, key = (inputs.per_value_head(x) for x in (inputs.query, inputs.key))
  keep = jnp.exp(inputs.log_decay.astype(wide))
  if first is not None:
    keep = jnp.where(first[..., None], 0, keep)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

  def step(state: State, token: tuple[Array, ...]) -> tuple[State, Array]:
    query, key, value, keep, beta = token
    state *= keep[..., None, None]
    known = product('BNHV,BNH->BNV', state, key)
    change = beta[..., None] * (value - known)
    state += key[..., None] * change[..., None, :]
    return state, product('BNHV,BNH->BNV', state, query)

  arrays = (query, key, inputs.value, keep, inputs.beta)
  by_token = tuple(jnp.moveaxis(x.astype(wide), 1, 0) for x in arrays)
  state, output = jax.lax.scan(step, state, by_token)
  return jnp.moveaxis(output, 0, 1), state


def first_tokens(
  segments: Int[Array, 'B T'], before: Int[Array, ' B'] | None = None
) -> Bool[Array, 'B T']:
  """True where a token begins a document.

  Args:
    segments: document of each token; padding is 0 and begins none.
    before: document of the token before the row; None: there is none.
  """
  if before is None:
    before = jnp.zeros_like(segments[:, 0])
  previous = jnp.concatenate([before[:, None], segments[:, :-1]], axis=1)
  return (segments != previous) & (segments != 0)
