"""The kernel of the backward pass.

Steps of the grid take the chunks from the last to the first; the gradient dS of
the state stays in VMEM between them. With the forward pass's e, T and S, the
gradient dO of what tokens read, and the formulas of `forward.py`,

    de = ((Q K^T) E)^T dO + w K dS           w = exp(G_last - G) beta
    dv = T^T de
    dS <- exp(G_last) dS + Q^T y - K^T z     y = exp(G) dO,  z = exp(G) dv

    dQ = y S^T + (X E) K                     X = dO e^T
    dK = w e dS^T - z S^T + (X E)^T Q - (Y + Y^T) K
                                             Y = (dv e^T) E below the diagonal

No gradient passes the triangular system but by a product with T^T: the
gradient of K K^T is dv e^T. Numbers of tokens have theirs from the same arrays.
Let W = X (Q K^T) - (dv e^T) (K K^T), element by element. Sums of W D over rows
are what beta gets, and differences of sums of W E over lanes and rows what G
gets, in pairs that cancel to the last bit where both tokens come after the one
whose decay is asked for.
"""

import functools
import itertools
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import Products
from gated_jax.ops.delta.pallas_tpu.spec import CHUNKS
from gated_jax.ops.delta.pallas_tpu.spec import Spec
from gated_jax.ops.delta.pallas_tpu.tokens import PerToken
from gated_jax.ops.delta.pallas_tpu.tokens import decay_of


class Refs(NamedTuple):
  """Arrays of a step in VMEM, in the order of the call."""

  query: Any
  key: Any
  rows: Any
  columns: Any
  errors: Any
  inverses: Any
  states: Any
  d_output: Any
  d_last: Any
  d_query: Any
  d_key: Any
  d_value: Any
  d_rows: Any
  d_columns: Any
  d_state: Any
  memory: Any  # the gradient of states, from step to step


class Within(NamedTuple):
  """A value head's chunk, as far as no later one changes it."""

  tokens: PerToken
  decay: Array  # D
  share: Array  # E
  d_error: Array  # ((Q K^T) E)^T dO
  d_scores: Array  # X
  slope: Array  # y
  read: Array  # y S^T
  added: Array  # Q^T y


class Across(NamedTuple):
  """Gradients of a value head's chunk that later ones change."""

  d_value: Array  # dv
  from_state: Array  # z S^T
  to_state: Array  # w e dS^T
  writing: Array  # gradient of w
  d_keep: Array  # terms of the gradient of exp(G_last), as a row


def kernel(*arrays: Any, spec: Spec) -> None:
  """Some chunks of some key heads and of the value heads that they serve."""
  refs = Refs(*arrays)
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _begin() -> None:
    refs.memory[...] = refs.d_last[0]

  similar, weights = {}, {}
  product = Products(refs.key.dtype)
  places = list(itertools.product(reversed(range(CHUNKS)), spec.heads))
  for c, h in places[:: spec.repeats]:
    query, key = (x[0, spec.tokens(c), spec.key(h)] for x in refs[:2])
    similar[c, h] = product(key, key, of=(1, 1))
    weights[c, h] = product(query, key, of=(1, 1))
  within = {
    (c, h): _within(
      c, h, weights[c, h // spec.repeats * spec.repeats], refs, spec
    )
    for c, h in places
  }
  for c in reversed(range(CHUNKS)):
    chunk = [within[c, h] for h in spec.heads]
    across = _across(c, chunk, refs, spec)
    for h in spec.heads[:: spec.repeats]:
      served = slice(h, h + spec.repeats)
      _write(
        c,
        h,
        (weights[c, h], similar[c, h]),
        chunk[served],
        across[served],
        refs,
        spec,
      )

  @pl.when(step == pl.num_programs(2) - 1)
  def _end() -> None:
    refs.d_state[0] = refs.memory[...]


def _within(c: int, h: int, weights: Array, refs: Refs, spec: Spec) -> Within:
  """Computes what no later chunk changes."""
  product, part = Products(refs.key.dtype), spec.tokens(c)
  tokens = PerToken(
    refs.rows[0, h, :, part], refs.columns[0, 0, part, spec.numbers(h)]
  )
  decay = decay_of(tokens)
  share = decay * tokens.row('beta')
  d_output = refs.d_output[0, part, spec.value(h)]
  errors = refs.errors[0, part, spec.value(h)]
  slope = (tokens.column('entering') * d_output).astype(refs.key.dtype)
  return Within(
    tokens,
    decay,
    share,
    product(weights * share, d_output, of=(0, 0)),
    product(d_output, errors, of=(1, 1)),
    slope,
    product(slope, refs.states[0, h, spec.state(c)], of=(1, 1)),
    product(refs.query[0, part, spec.key(h)], slope, of=(0, 0)),
  )


def _across(
  c: int, chunk: list[Within], refs: Refs, spec: Spec
) -> list[Across]:
  """Takes the gradient of all heads' states back through a chunk."""
  product, dtype = Products(refs.key.dtype), refs.key.dtype
  heads, part = spec.heads, spec.tokens(c)
  keys = [refs.key[0, part, spec.key(h)] for h in heads]
  errors = [refs.errors[0, part, spec.value(h)] for h in heads]
  states = [refs.states[0, h, spec.state(c)] for h in heads]
  d_states = [refs.memory[h].astype(dtype) for h in heads]
  writing = [x.tokens.column('writing') for x in chunk]
  known = [product(keys[h], d_states[h]) for h in heads]
  d_values = [
    product(
      refs.inverses[0, h, part],
      chunk[h].d_error + writing[h] * known[h],
      of=(0, 0),
    )
    for h in heads
  ]
  slopes = [
    (x.tokens.column('entering') * d_value).astype(dtype)
    for x, d_value in zip(chunk, d_values, strict=True)
  ]
  removed = [product(keys[h], slopes[h], of=(0, 0)) for h in heads]
  across = [
    Across(
      d_values[h].astype(dtype),
      product(slopes[h], states[h], of=(1, 1)),
      product(writing[h] * errors[h], d_states[h], of=(1, 1)),
      errors[h] * known[h],
      jnp.sum(refs.memory[h] * states[h], axis=0, keepdims=True),
    )
    for h in heads
  ]
  for h in heads:
    keep = chunk[h].tokens.row('entering')[:, CHUNK - 1 :]
    refs.memory[h] = keep * refs.memory[h] + (chunk[h].added - removed[h])
    refs.d_value[0, part, spec.value(h)] = across[h].d_value
  return across


def _write(
  c: int,
  h: int,
  products: tuple[Array, Array],
  within: list[Within],
  across: list[Across],
  refs: Refs,
  spec: Spec,
) -> None:
  """Writes gradients of a key head's chunk, and of its value heads' numbers.

  Args:
    c: the chunk.
    h: the first value head that the key head serves.
    products: Q K^T and K K^T.
    within: of the value heads.
    across: of the value heads.
    refs: arrays of the step.
    spec: sizes.
  """
  product, part = Products(refs.key.dtype), spec.tokens(c)
  query, key = (x[0, part, spec.key(h)] for x in refs[:2])
  weights, similar = products
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1)
  )
  before = row > column
  similar = jnp.where(before, similar, 0)
  scores, couplings = [], []
  for i, (here, back) in enumerate(zip(within, across, strict=True)):
    errors = refs.errors[0, part, spec.value(h + i)]
    d_coupling = product(back.d_value, errors, of=(1, 1))
    scores.append(here.d_scores * here.share)
    couplings.append(d_coupling * here.share)
    pairs = (here.d_scores * weights - d_coupling * similar) * here.decay
    total = _one_register(query * here.read - key * back.from_state)
    total += pairs * here.tokens.row('beta')
    columns = total, _one_register(back.writing)
    rows = jnp.sum(pairs, axis=0, keepdims=True), _one_register(back.d_keep)
    first = spec.numbers(h + i).start
    for k in range(2):
      refs.d_rows[0, h + i, k : k + 1, part] = rows[k]
      refs.d_columns[0, 0, part, first + k : first + k + 1] = jnp.sum(
        columns[k], axis=1, keepdims=True
      )
  d_weights = _sum(scores)
  d_similar = jnp.where(before, _sum(couplings), 0)
  d_similar += d_similar.T
  d_query = _sum([x.read for x in within]) + product(d_weights, key)
  d_key = _sum([x.to_state - x.from_state for x in across])
  d_key += product(d_weights, query, of=(0, 0)) - product(d_similar, key)
  refs.d_query[0, part, spec.key(h)] = d_query.astype(key.dtype)
  refs.d_key[0, part, spec.key(h)] = d_key.astype(key.dtype)


def _one_register(x: Float[Array, 'R n']) -> Float[Array, 'R C']:
  """Sums of lanes that lie in different registers."""
  return _sum([x[:, i : i + CHUNK] for i in range(0, x.shape[1], CHUNK)])


def _sum(arrays: list[Array]) -> Array:
  return functools.reduce(operator.add, arrays)
