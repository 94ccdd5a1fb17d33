"""Attention over a sequence that is split over devices, inside shard_map.

With P devices the sequence is cut into 2 P equal chunks, and device i holds
chunks i and 2 P - 1 - i. Keys and values are gathered; queries, gates and
outputs stay where they are. `zigzag` is the order of positions that puts
chunks there, for whoever lays out the batch.

Each chunk attends to itself causally, and to all of every chunk before it.
Chunk i has i before it and chunk 2 P - 1 - i the rest of 2 P - 1, so every
device computes the same number of equal squares, by a kernel that need not
know about offsets. No product is computed twice or in vain:

- A backend that does not compute what document numbers hide attends with each
  chunk to all keys, of which those that are not before it get a document of
  their own.
- Any other backend has all squares as one batch, 2 P - 1 times as large. The
  price is memory: queries and outputs of all squares are those of the whole
  sequence.

The parts are joined by their log-sum-exp, then gated.

With a window most squares would be empty. There both chunks attend to all
keys, by a backend that takes offsets.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention.spec import Attend
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.gate import apply_gate

# Document number of keys that a chunk must not see. Documents of tokens count
# from 1, and padding is 0.
NOWHERE = -1

# (causal, query, key, value, query_ids, key_ids) of squares [C, B, t, ...] to
# their outputs and log-sum-exps [C, B, t, N].
AttendSquares = Callable[..., tuple[Array, Array]]
# Query, key, value and document numbers of both chunks, each [2, B, t, ...].
Halves = tuple[Array, Array, Array, Array | None]


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

  attend_squares = _on_squares(function, masking, spec)
  query, key, value, gate_logits = inputs
  ids = masking.query_segments
  halves = (
    _halves(query),
    _halves(key),
    _halves(value),
    None if ids is None else _halves(ids),
  )
  diagonal = attend_squares(True, *halves, halves[3])
  others = (_all_keys if skips else _squares)(attend_squares, halves, axis)
  output, lse = (
    jnp.concatenate(list(x), axis=1) for x in _join(diagonal, *others)
  )
  if gate_logits is None or spec.gate.model_dtype:
    output = output.astype(query.dtype)
  if gate_logits is not None:
    output = apply_gate(output, gate_logits, spec.gate).astype(query.dtype)
  return Result(output, jnp.swapaxes(lse, 1, 2) if spec.return_lse else None)


def _on_squares(
  function: Attend, masking: Masking, spec: AttentionSpec
) -> AttendSquares:
  """`function` on squares [C, B, t, ...], which are one batch to it."""

  def attend_squares(
    causal: bool,
    q: Array,
    k: Array,
    v: Array,
    ids: Array | None,
    kv_ids: Array | None,
  ) -> tuple[Array, Array]:
    """Attends square by square, and gives outputs with their log-sum-exps."""
    output, lse = function(
      Inputs(_flat(q), _flat(k), _flat(v)),
      Masking(
        None if ids is None else _flat(ids),
        None if kv_ids is None else _flat(kv_ids),
        dropout_key=masking.dropout_key,
      ),
      dataclasses.replace(spec, causal=causal, return_lse=True),
    )
    assert lse is not None
    lse = jnp.swapaxes(lse, 1, 2)
    return output.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

  return attend_squares


def _all_keys(
  attend_squares: AttendSquares, halves: Halves, axis: str
) -> tuple[Array, Array, None]:
  """Each half to all keys, of which those not before it are hidden."""
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  q, k, v, ids = halves
  if ids is None:
    ids = jnp.zeros(q.shape[:3], jnp.int32)

  def whole(x: Array) -> Array:
    """[2, B, t, ...] of this device to [B, S, ...] of all, in zigzag order."""
    gathered = jax.lax.all_gather(x, axis, tiled=True)
    gathered = jnp.moveaxis(gathered, 0, 1)
    return gathered.reshape(x.shape[1], -1, *x.shape[3:])

  keys, values, kv_ids = (whole(x) for x in (k, v, ids))
  chunk = jnp.repeat(jnp.asarray(_order(parts)), q.shape[2])
  results = []
  for half, own in enumerate((index, 2 * parts - 1 - index)):
    seen = jnp.where(chunk < own, kv_ids, NOWHERE)
    arrays = (q[half], keys, values, ids[half], seen)
    results.append(attend_squares(False, *(x[None] for x in arrays)))
  output, lse = (jnp.concatenate(each) for each in zip(*results, strict=True))
  return output, lse, None


def _squares(
  attend_squares: AttendSquares, halves: Halves, axis: str
) -> tuple[Array, Array, Bool[Array, ' C']]:
  """All squares as one batch, and which of them are the second half's."""
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  q, k, v, ids = halves
  # Square j is the first chunk with chunk j of the keys, until that has no more
  # before it; then it is the second chunk with chunk j - index.
  j = jnp.arange(2 * parts - 1)
  second = j >= index
  place = jnp.asarray(np.argsort(_order(parts)))
  chunk = place[j - index * second]

  def keys(x: Array) -> Array:
    """The keys of all devices, in the order of the chunk's positions."""
    gathered = jax.lax.all_gather(x, axis, tiled=True)
    return jnp.take(gathered, chunk, axis=0, mode='clip')

  output, lse = attend_squares(
    False,
    _choose(second, q),
    keys(k),
    keys(v),
    None if ids is None else _choose(second, ids),
    None if ids is None else keys(ids),
  )
  return output, lse, second


def _order(parts: int) -> list[int]:
  """Chunks in the order of the devices that hold them."""
  return [c for i in range(parts) for c in (i, 2 * parts - 1 - i)]


def _halves(x: Array) -> Array:
  """[B, 2 t, ...] to [2, B, t, ...]."""
  return jnp.stack(jnp.split(x, 2, axis=1))


def _flat(x: Array) -> Array:
  """[C, B, ...] to [C B, ...]."""
  return x.reshape(-1, *x.shape[2:])


def _choose(second: Bool[Array, ' C'], x: Array) -> Array:
  """x[1] where `second` says so, else x[0]: [2, ...] to [C, ...]."""
  return jnp.where(second.reshape(-1, *[1] * (x.ndim - 1)), x[1], x[0])


def _join(
  diagonal: tuple[Array, Array],
  output: Float[Array, 'C B t N V'],
  lse: Float[Array, 'C B t N'],
  second: Bool[Array, ' C'] | None,
) -> tuple[Float[Array, '2 B t N V'], Float[Array, '2 B t N']]:
  """Softmax over the parts of each row.

  Args:
    diagonal: output and log-sum-exp of each half with itself.
    output: those of the other parts.
    lse: likewise.
    second: which half each of them belongs to; None: there is one for either.
  """
  own, own_lse = diagonal

  def per_half(reduce: Callable[..., Array], x: Array, nothing: float) -> Array:
    """Reduces the squares of each half of the queries by themselves."""
    if second is None:
      return x
    mask = second.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.stack(
      [reduce(jnp.where(mine, x, nothing), axis=0) for mine in (~mask, mask)]
    )

  top = jnp.maximum(own_lse, per_half(jnp.max, lse, -jnp.inf))
  top = jax.lax.stop_gradient(top)
  own_weight = jnp.exp(own_lse - top)
  weight = jnp.exp(lse - (top if second is None else _choose(second, top)))
  total = own_weight + per_half(jnp.sum, weight, 0.0)
  weighted = output.astype(lse.dtype) * weight[..., None]
  joined = own * own_weight[..., None] + per_half(jnp.sum, weighted, 0.0)
  return joined / total[..., None], top + jnp.log(total)


def _by_offset(
  function: Attend,
  inputs: Inputs,
  masking: Masking,
  spec: AttentionSpec,
  axis: str,
) -> Result:
  """Both chunks to all keys, each with its position as the offset."""
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  query, key, value, gate_logits = inputs
  batch, half = query.shape[0], query.shape[1] // 2
  places = np.argsort(_order(parts))

  def whole(x: Array) -> Array:
    """This device's [B, t, ...] to [B, S, ...] of all, in order."""
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    chunks = jnp.split(x, 2 * parts, axis=1)
    return jnp.concatenate([chunks[place] for place in places], axis=1)

  keys, values = whole(key), whole(value)
  ids = masking.query_segments
  kv_ids = None if ids is None else whole(ids)
  results = []
  for first, chunk in ((0, index), (half, 2 * parts - 1 - index)):
    rows = slice(first, first + half)
    own_inputs = Inputs(
      query[:, rows],
      keys,
      values,
      None if gate_logits is None else gate_logits[:, rows],
    )
    own_masking = Masking(
      None if ids is None else ids[:, rows],
      kv_ids,
      jnp.full((batch,), chunk * half, jnp.int32),
      dropout_key=masking.dropout_key,
    )
    results.append(function(own_inputs, own_masking, spec))
  output = jnp.concatenate([r.output for r in results], axis=1)
  lses = [r.lse for r in results if r.lse is not None]
  return Result(output, jnp.concatenate(lses, axis=2) if lses else None)
