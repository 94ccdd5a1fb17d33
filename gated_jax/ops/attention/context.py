"""Attention over a sequence that is split over devices, inside shard_map.

With P devices the sequence is cut into 2 P equal chunks, and device i holds
chunks i and 2 P - 1 - i: then all of them have the same number of visible
(query, key) pairs under a causal mask. Keys and values are gathered, queries,
gates and outputs stay where they are. `zigzag` is the order of positions that
puts chunks there, for whoever lays out the batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result


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
  order = [c for i in range(parts) for c in (i, 2 * parts - 1 - i)]
  return chunks[order].reshape(-1)


def attend(
  function: Callable[..., Result],
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  gate: Float[Array, 'B T N #H'] | None,
  masking: Masking,
  spec: AttentionSpec,
  axis: str,
) -> Result:
  """Causal self-attention of this device's two chunks to all keys.

  Args:
    function: (query, key, value, gate, masking, spec) -> Result, on whole
      keys and queries that begin at masking.query_offset.
    query: this device's part, in zigzag order, as the other arrays.
    key: likewise.
    value: likewise.
    gate: likewise.
    masking: its segments only.
    spec: causal.
    axis: the mesh axis that splits the sequence.
  """
  if not spec.causal or masking.mask is not None:
    raise NotImplementedError(
      'a sequence split over devices is attended to causally, without a mask'
    )
  parts, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  batch, half = query.shape[0], query.shape[1] // 2
  chunks = np.arange(2 * parts)
  # Chunk c lies at this place of the gathered array.
  where = np.argsort([c for i in range(parts) for c in (i, 2 * parts - 1 - i)])

  def whole(x: Array) -> Array:
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    pieces = jnp.split(x, 2 * parts, axis=1)
    return jnp.concatenate([pieces[where[c]] for c in chunks], axis=1)

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
    results.append(function(part(query), keys, values, part(gate), own, spec))
  lse = None
  if spec.return_lse:
    parts_of_lse: list[Any] = [r.lse for r in results]
    lse = jnp.concatenate(parts_of_lse, axis=2)
  return Result(jnp.concatenate([r.output for r in results], axis=1), lse)
