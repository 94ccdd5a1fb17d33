"""The kernel of the forward pass.

A step of the grid takes some chunks of some key heads, and all value heads that
those serve, whose states stay in VMEM from step to step. The formulas are those
of `gated_jax/ops/delta/chunks.py`, with

    u = T (beta (v - exp(G) K S))          o = exp(G) Q S + ((Q K^T) D) u
"""

import itertools
from typing import Any
from typing import NamedTuple

from jax.experimental import pallas as pl
from jaxtyping import Array

from gated_jax.ops.delta.pallas_tpu.products import CHUNK
from gated_jax.ops.delta.pallas_tpu.products import SUBLANES
from gated_jax.ops.delta.pallas_tpu.products import Products
from gated_jax.ops.delta.pallas_tpu.products import inverses_of
from gated_jax.ops.delta.pallas_tpu.tokens import PerToken
from gated_jax.ops.delta.pallas_tpu.tokens import decay_of

# Chunks of a step of the grid.
CHUNKS = 2


class Spec(NamedTuple):
  """Sizes of a step: key heads, value heads of each, and their channels."""

  keys: int
  repeats: int
  width: int
  channels: int


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


def kernel(*arrays: Any, spec: Spec) -> None:
  """Some chunks of some key heads and of the value heads that they serve.

  Chunks and heads advance together, product by product: each is a chain, and
  the matrix units would wait for a single one.
  """
  refs = Refs(*arrays)
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _begin() -> None:
    refs.memory[...] = refs.state[0]

  product = Products(refs.key.dtype)
  chunks, heads = range(CHUNKS), range(spec.keys * spec.repeats)

  def tokens_of(chunk: int) -> slice:
    """The rows of a chunk."""
    return slice(chunk * CHUNK, (chunk + 1) * CHUNK)

  def key_head(ref: Any, chunk: int, head: int) -> Array:
    """Queries or keys of the key head that serves a value head."""
    at = head // spec.repeats * spec.width
    return ref[0, tokens_of(chunk), at : at + spec.width]

  def value_head(head: int) -> slice:
    """The channels of a value head."""
    return slice(head * spec.channels, (head + 1) * spec.channels)

  tokens, decays, couplings, scores = {}, {}, {}, {}
  for c, head in itertools.product(chunks, heads):
    lanes = slice(head * SUBLANES, (head + 1) * SUBLANES)
    tokens[c, head] = PerToken(
      refs.rows[0, head, :, tokens_of(c)],
      refs.columns[0, 0, tokens_of(c), lanes],
    )
    decays[c, head] = decay_of(tokens[c, head])
    if head % spec.repeats == 0:
      query, key = (key_head(ref, c, head) for ref in (refs.query, refs.key))
      similar = product(key, key, of=(1, 1))
      weights = product(query, key, of=(1, 1))
    beta = tokens[c, head].column('beta')
    couplings[c, head] = similar * decays[c, head] * beta
    scores[c, head] = (weights * decays[c, head]).astype(key.dtype)
  inverses = dict(
    zip(couplings, inverses_of(list(couplings.values()), product), strict=True)
  )
  inverses = {
    at: (x * tokens[at].row('beta')).astype(key.dtype)
    for at, x in inverses.items()
  }
  for c in chunks:
    part = tokens_of(c)
    entering = [tokens[c, head].column('entering') for head in heads]
    leaving = [tokens[c, head].column('leaving') for head in heads]
    state = [refs.memory[head].astype(key.dtype) for head in heads]
    known = [product(key_head(refs.key, c, h), state[h]) for h in heads]
    read = [product(key_head(refs.query, c, h), state[h]) for h in heads]
    written = [
      product(
        inverses[c, h],
        refs.value[0, part, value_head(h)] - entering[h] * known[h],
      )
      for h in heads
    ]
    added = [
      product(key_head(refs.key, c, h), leaving[h] * written[h], of=(0, 0))
      for h in heads
    ]
    own = [product(scores[c, h], written[h]) for h in heads]
    for h in heads:
      keep = tokens[c, h].row('entering')[:, CHUNK - 1 :]
      refs.memory[h] = keep * refs.memory[h] + added[h]
      output = entering[h] * read[h] + own[h]
      refs.output[0, part, value_head(h)] = output.astype(refs.output.dtype)

  @pl.when(step == pl.num_programs(2) - 1)
  def _end() -> None:
    refs.last[0] = refs.memory[...]
