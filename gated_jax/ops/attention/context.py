"""Attention over a sequence that is split over devices, inside shard_map.

With P devices the sequence is cut into 2 P equal chunks, and device i holds
chunks i and 2 P - 1 - i. Keys and values are gathered, queries, gates and
outputs stay where they are. `zigzag` is the order of positions that puts
chunks there, for whoever lays out the batch.

Each chunk attends to itself causally, and to all of every chunk before it.
Chunk i has i before it and chunk 2 P - 1 - i the rest of 2 P - 1, so on every
device the same number of equal squares is to be computed, by a kernel that
need not know about offsets. No product is computed twice or in vain:

- A backend that leaves out what document numbers hide attends with each chunk
  to all keys, of which those that are not before it belong to no document.
- Any other has all squares as one batch, 2 P - 1 times as large. The price is
  memory: queries and outputs of all squares are those of the whole sequence.

The parts are joined by their log-sum-exp, then gated.

With a window most squares would be empty. There both chunks attend to all
keys, by a backend that takes offsets.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gated_jax.ops.attention.spec import Attend
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.gate import apply_gate

# The document of keys that a chunk must not see. Documents count from 0.
NOWHERE = -1


def zigzag(length: int, parts: int) -> np.ndarray:
  """Positions in the order of the devices that hold them.

  Raises:
    ValueError: the length is no multiple of 2 * parts.
  """
  if parts == 1:
    return np.arange(length)
  if length % (2 * parts):
    raise ValueError(
      f'a length of {length} must be a multiple of {2 * parts}, two chunks '
      f'for each of {parts} devices on the context axis'
    )
  chunks = np.arange(length).reshape(2 * parts, -1)
  return chunks[_order(parts)].reshape(-1)


def attend(
  function: Attend,
  inputs: Inputs,
  masking: Masking,
  spec: AttentionSpec,
  axis: str,
  *,
  skips: bool = False,
) -> Result:
  """Causal self-attention of this device's two chunks to all keys.

  Args:
    function: attention of one device. With a window it is given whole keys and
      a masking.query_offset.
    inputs: this device's part, in zigzag order.
    masking: its segments only.
    spec: causal.
    axis: the mesh axis that splits the sequence.
    skips: whether function does not compute what segments hide.
  """
  if not spec.causal or masking.mask is not None:
    raise NotImplementedError(
      'a sequence split over devices is attended to causally, without a mask'
    )
  if spec.window:
    return _by_offset(function, inputs, masking, spec, axis)
  query, key, value, gate_logits = inputs

  def call(causal, q, k, v, ids, kv_ids):
    """Squares [C, B, t, ...], as one batch."""
    segments = [None if x is None else _flat(x) for x in (ids, kv_ids)]
    output, lse = function(
      Inputs(_flat(q), _flat(k), _flat(v)),
      masking._replace(query_segments=segments[0], kv_segments=segments[1]),
      dataclasses.replace(spec, causal=causal, return_lse=True),
    )
    assert lse is not None
    lse = jnp.swapaxes(lse, 1, 2)
    return output.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

  q, k, v, ids = (
    None if x is None else jnp.stack(jnp.split(x, 2, axis=1))
    for x in (query, key, value, masking.query_segments)
  )
  halves = (q, k, v, ids)
  diagonal = call(True, q, k, v, ids, ids)
  others = (_hidden if skips else _squares)(call, halves, axis)
  output, lse = (
    jnp.concatenate(list(x), axis=1) for x in _join(diagonal, *others)
  )
  if gate_logits is None or spec.gate.model_dtype:
    output = output.astype(query.dtype)
  if gate_logits is not None:
    output = apply_gate(output, gate_logits, spec.gate).astype(query.dtype)
  return Result(output, jnp.swapaxes(lse, 1, 2) if spec.return_lse else None)


def _hidden(call, halves, axis):
  """Each half to all keys, of which those not before it are hidden."""
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  q, k, v, ids = halves
  if ids is None:
    ids = jnp.zeros(q.shape[:3], jnp.int32)

  def whole(x):
    """[2, B, t, ...] of this device to [B, S, ...] of all, as they lie."""
    everyone = jax.lax.all_gather(x, axis, tiled=True)
    everyone = jnp.moveaxis(everyone, 0, 1)
    return everyone.reshape(x.shape[1], -1, *x.shape[3:])

  keys, values, kv_ids = (whole(x) for x in (k, v, ids))
  chunk = jnp.repeat(jnp.asarray(_order(parts)), q.shape[2])
  found = []
  for half, own in enumerate((index, 2 * parts - 1 - index)):
    seen = jnp.where(chunk < own, kv_ids, NOWHERE)
    arrays = (q[half], keys, values, ids[half], seen)
    found.append(call(False, *(x[None] for x in arrays)))
  output, lse = (jnp.concatenate(each) for each in zip(*found, strict=True))
  return output, lse, None


def _squares(call, halves, axis):
  """All squares as one batch, and which of them are the second half's."""
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  q, k, v, ids = halves
  # Square j: the first chunk and chunk j of the keys, until that has no more
  # before it; then the second chunk and chunk j - index.
  j = jnp.arange(2 * parts - 1)
  second = j >= index
  place = jnp.asarray(np.argsort(_order(parts)))
  chunk = place[j - index * second]

  def queries(x):
    return None if x is None else _choose(second, x)

  def keys(x):
    if x is None:
      return None
    everyone = jax.lax.all_gather(x, axis, tiled=True)
    return jnp.take(everyone, chunk, axis=0, mode='clip')

  found = call(False, queries(q), keys(k), keys(v), queries(ids), keys(ids))
  return (*found, second)


def _order(parts: int) -> list[int]:
  """Chunks in the order of the devices that hold them."""
  return [c for i in range(parts) for c in (i, 2 * parts - 1 - i)]


def _flat(x: Array) -> Array:
  return x.reshape(-1, *x.shape[2:])


def _choose(second: Array, x: Array) -> Array:
  """x[1] where `second` says so, else x[0]: [2, ...] to [C, ...]."""
  return jnp.where(second.reshape(-1, *[1] * (x.ndim - 1)), x[1], x[0])


def _join(diagonal, output, lse, second):
  """Softmax over the parts of a row: outputs [C, B, t, N, H], lse without H.

  `second` says which half each part beside the diagonal's belongs to; None:
  there is one for either.
  """
  own, own_lse = diagonal

  def per_half(reduce, x, nothing):
    if second is None:
      return x
    mask = second.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.stack(
      [reduce(jnp.where(here, x, nothing), axis=0) for here in (~mask, mask)]
    )

  top = jnp.maximum(own_lse, per_half(jnp.max, lse, -jnp.inf))
  top = jax.lax.stop_gradient(top)
  own_weight = jnp.exp(own_lse - top)
  weight = jnp.exp(lse - (top if second is None else _choose(second, top)))
  total = own_weight + per_half(jnp.sum, weight, 0.0)
  weighted = output.astype(lse.dtype) * weight[..., None]
  joined = own * own_weight[..., None] + per_half(jnp.sum, weighted, 0.0)
  return joined / total[..., None], top + jnp.log(total)


def _by_offset(function, inputs, masking, spec, axis):
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  query, key, value, gate_logits = inputs
  batch, half = query.shape[0], query.shape[1] // 2
  where = np.argsort(_order(parts))

  def whole(x: Array) -> Array:
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    pieces = jnp.split(x, 2 * parts, axis=1)
    return jnp.concatenate([pieces[place] for place in where], axis=1)

  keys, values = whole(key), whole(value)
  segments = masking.query_segments
  kv_segments = None if segments is None else whole(segments)
  results = []
  for first, chunk in ((0, index), (half, 2 * parts - 1 - index)):

    def part(x, first=first):
      return None if x is None else x[:, first : first + half]

    offset = jnp.full((batch,), chunk * half, jnp.int32)
    own = Masking(
      part(segments), kv_segments, offset, dropout_key=masking.dropout_key
    )
    own_inputs = Inputs(part(query), keys, values, part(gate_logits))
    results.append(function(own_inputs, own, spec))
  lse = None
  if spec.return_lse:
    parts_of_lse: list[Any] = [r.lse for r in results]
    lse = jnp.concatenate(parts_of_lse, axis=2)
  return Result(jnp.concatenate([r.output for r in results], axis=1), lse)
