"""The kernel of the forward pass.

A step of the grid takes some chunks of some key heads, and all value heads that
those serve, whose states stay in VMEM from step to step. The formulas are those
of `gated_jax/ops/delta/chunks.py`, written for the errors e of which a token
corrects a share beta, u = beta e. With E the matrix D, its columns times beta,

    e = T (v - exp(G) K S)                   T = (I + (K K^T) E)^-1
    o = exp(G) Q S + ((Q K^T) E) e
    S <- exp(G_last) S + (K^T diag(exp(G_last - G) beta)) e

Entries of this T are bounded by one, too: they are the shares of one token's
value that a later one finds under its key.

Where gradients will be wanted the kernel also writes e, T and the states that
chunks start from, for `backward.py`.
"""

import itertools
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import Products
from gated_jax.ops.delta.pallas_tpu.products import inverses_of
from gated_jax.ops.delta.pallas_tpu.spec import CHUNKS
from gated_jax.ops.delta.pallas_tpu.spec import Spec
from gated_jax.ops.delta.pallas_tpu.tokens import PerToken
from gated_jax.ops.delta.pallas_tpu.tokens import decay_of


class Refs(NamedTuple):
  """Arrays of a step in VMEM, in the order of the call."""

  query: Any
  key: Any
  value: Any
  rows: Any
  columns: Any
  state: Any
  output: Any
  last: Any
  memory: Any  # states, from step to step


class Residuals(NamedTuple):
  """Arrays that the backward pass reads, in the order of the call."""

  errors: Any
  inverses: Any
  states: Any


class Chunk(NamedTuple):
  """A value head's chunk, as far as it does not depend on the state."""

  tokens: PerToken
  inverse: Array
  scores: Array


def kernel(*arrays: Any, spec: Spec, saves: bool) -> None:
  """Some chunks of some key heads and of the value heads that they serve.

  Chunks and heads advance together, product by product: each is a chain, and
  the matrix units would wait for a single one.

  Args:
    arrays: `Refs`, with `Residuals` before the last one where it saves them.
    spec: sizes.
    saves: whether it writes what gradients need.
  """
  residuals = Residuals(*arrays[-4:-1]) if saves else None
  refs = Refs(*(arrays[:-4] + arrays[-1:] if saves else arrays))
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _begin() -> None:
    refs.memory[...] = refs.state[0]

  product = Products(refs.key.dtype)
  tokens, scores, couplings = {}, {}, {}
  for c, h in itertools.product(range(CHUNKS), spec.heads):
    part = spec.tokens(c)
    tokens[c, h] = PerToken(
      refs.rows[0, h, :, part], refs.columns[0, 0, part, spec.numbers(h)]
    )
    if h % spec.repeats == 0:
      query, key = (x[0, part, spec.key(h)] for x in (refs.query, refs.key))
      both = product(jnp.concatenate([key, query]), key, of=(1, 1))
      similar, weights = both[:CHUNK], both[CHUNK:]
    share = decay_of(tokens[c, h]) * tokens[c, h].row('beta')
    couplings[c, h] = similar * share
    scores[c, h] = (weights * share).astype(key.dtype)
  inverses = dict(
    zip(couplings, inverses_of(list(couplings.values()), product), strict=True)
  )
  inverses = {at: x.astype(key.dtype) for at, x in inverses.items()}
  for c in range(CHUNKS):
    chunk = [
      Chunk(tokens[c, h], inverses[c, h], scores[c, h]) for h in spec.heads
    ]
    states, errors = _pass(c, chunk, refs, spec)
    if residuals is not None:
      for h in spec.heads:
        residuals.states[0, h, spec.state(c)] = states[h]
        residuals.inverses[0, h, spec.tokens(c)] = inverses[c, h]
        residuals.errors[0, spec.tokens(c), spec.value(h)] = errors[h]

  @pl.when(step == pl.num_programs(2) - 1)
  def _end() -> None:
    refs.last[0] = refs.memory[...]


def _pass(
  c: int, chunk: list[Chunk], refs: Refs, spec: Spec
) -> tuple[list[Array], list[Array]]:
  """Takes the states of all heads through a chunk, and writes its output.

  Returns:
    The states before, and the errors, both as products take them.
  """
  product, dtype = Products(refs.key.dtype), refs.key.dtype
  heads, part = spec.heads, spec.tokens(c)
  keys = [refs.key[0, part, spec.key(h)] for h in heads]
  queries = [refs.query[0, part, spec.key(h)] for h in heads]
  entering = [x.tokens.column('entering') for x in chunk]
  # A token's share of the state scales a column of K^T: a row of numbers, which
  # is spread over sublanes for nothing. As a factor of the errors it would be a
  # column, and the units that spread those over lanes are the busiest.
  turned = [
    refs.key[0, part, spec.key(h)].T.astype(jnp.float32)
    for h in heads[:: spec.repeats]
  ]
  states = [refs.memory[h].astype(dtype) for h in heads]
  both = [
    product(jnp.concatenate([keys[h], queries[h]]), states[h]) for h in heads
  ]
  known = [x[:CHUNK] for x in both]
  read = [x[CHUNK:] for x in both]
  errors = [
    product(
      chunk[h].inverse,
      refs.value[0, part, spec.value(h)] - entering[h] * known[h],
    )
    for h in heads
  ]
  narrow = [x.astype(dtype) for x in errors]
  added = [
    product(
      turned[h // spec.repeats] * chunk[h].tokens.row('writing'), narrow[h]
    )
    for h in heads
  ]
  own = [product(chunk[h].scores, narrow[h]) for h in heads]
  for h in heads:
    keep = chunk[h].tokens.row('entering')[:, CHUNK - 1 :]
    refs.memory[h] = keep * refs.memory[h] + added[h]
    output = entering[h] * read[h] + own[h]
    refs.output[0, part, spec.value(h)] = output.astype(refs.output.dtype)
  return states, narrow
