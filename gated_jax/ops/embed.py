"""Rows of an embedding for tokens, where both may be split over devices.

The table is gathered along its width in the dtype of the activations; its
gradient is summed in float32, since a frequent token's row is the sum of
thousands of terms, and scattered again.

A loss that multiplies by the same table has a gradient of it as well, which
each device sums over its own tokens. Through an inlet that gradient comes here
before it is summed over devices: tokens' terms are added to it in place, and
one sum over devices is made of both.

On a mesh, the caller hands in a wrapper that runs a function on each device's
shard: meshes are its business. The hand-written gradient stands outside of it,
because a gradient through `shard_map` would sum the table's over devices by
rules of its own, in another dtype.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

# (function, differentiate) to the function on each device's shard of whole
# arrays. `differentiate` tells the forward function from its gradient.
Shard = Callable[[Callable[..., Any], bool], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class EmbedSpec:
  """Static options; axis names inside shard_map, '' and () without."""

  dtype: str = 'float32'  # the dtype of the rows that are returned
  token_axes: tuple[str, ...] = ()
  vocab_axis: str = ''
  width_axes: tuple[str, ...] = ()


def unsharded(function: Any, differentiate: bool) -> Any:
  """The wrapper where there is no mesh: the function as it is."""
  del differentiate
  return function


def embed(
  table: Float[Array, 'V D'],
  tokens: Int[Array, 'B T'],
  spec: EmbedSpec = EmbedSpec(),
  shard: Shard = unsharded,
) -> Float[Array, 'B T D']:
  """The table's row of every token; a token below 0 or beyond V has zeros.

  Args:
    table: [V, D].
    tokens: ids.
    spec: static options.
    shard: runs a function on each device's shard: (table, tokens) to rows, or,
      where its second argument is true, (d_rows, tokens, table) to the table's
      gradient.
  """
  return _embed(spec, shard, None, table, tokens)[0]


def embed_with_inlet(
  table: Float[Array, 'V D'],
  tokens: Int[Array, 'B T'],
  spec: EmbedSpec,
  shard: Shard,
  parts: tuple[int, int],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'b t V D']]:
  """As `embed`, and an inlet for another gradient of the table.

  Args:
    table: [V, D].
    tokens: ids.
    spec: static options.
    shard: as for `embed`; the gradient's function takes the inlet's gradient
      after the table.
    parts: (b, t), the number of parts that rows and tokens are split into.

  Returns:
    The rows, and the inlet: nothing is to be read there. What is given as its
    gradient, for each part the sum over its tokens, is added to the table's.
  """
  rows, inlet = _embed(spec, shard, parts, table, tokens)
  assert inlet is not None
  return rows, inlet


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _embed(
  spec: EmbedSpec,
  shard: Shard,
  parts: tuple[int, int] | None,
  table: Array,
  tokens: Array,
) -> tuple[Array, Array | None]:
  def run(table: Array, tokens: Array) -> Array:
    """Each device's share of the work: its rows of the table."""
    table = table.astype(jnp.dtype(spec.dtype))
    if spec.width_axes:
      table = jax.lax.all_gather(table, spec.width_axes, axis=1, tiled=True)
    ids, known = _local_ids(tokens, table.shape[0], spec)
    rows = jnp.where(known[..., None], jnp.take(table, ids, axis=0), 0)
    return jax.lax.psum(rows, spec.vocab_axis) if spec.vocab_axis else rows

  rows = shard(run, False)(table, tokens)
  if parts is None:
    return rows, None
  return rows, jnp.zeros((*parts, *table.shape), _wide(table))


def _wide(table: Array) -> jnp.dtype:
  """The dtype in which the table's gradient is summed."""
  return jnp.promote_types(table.dtype, jnp.float32)


def _local_ids(
  tokens: Int[Array, 'B T'], size: int, spec: EmbedSpec
) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
  """Ids in this device's part of the vocabulary, and which lie in it."""
  if spec.vocab_axis:
    tokens = tokens - jax.lax.axis_index(spec.vocab_axis) * size
  return jnp.clip(tokens, 0, size - 1), (tokens >= 0) & (tokens < size)


def _forward(
  spec: EmbedSpec,
  shard: Shard,
  parts: tuple[int, int] | None,
  table: Array,
  tokens: Array,
) -> tuple[tuple[Array, Array | None], tuple[Array, Array]]:
  return _embed(spec, shard, parts, table, tokens), (table, tokens)


def _backward(
  spec: EmbedSpec,
  shard: Shard,
  parts: tuple[int, int] | None,
  saved: tuple[Array, Array],
  gradients: tuple[Array, Array | None],
) -> tuple[Array, None]:
  table, tokens = saved
  d_rows, d_inlet = gradients

  def run(d_rows: Array, tokens: Array, table: Array, *d_inlet: Array) -> Array:
    """The gradient of a device's rows of the table."""
    wide = _wide(table)
    ids, known = _local_ids(tokens, table.shape[0], spec)
    terms = jnp.where(known[..., None], d_rows.astype(wide), 0)
    if d_inlet:
      start = d_inlet[0][0, 0]
    else:
      start = jnp.zeros((table.shape[0], terms.shape[-1]), wide)
    gradient = start.at[ids].add(terms)
    if spec.width_axes:
      gradient = jax.lax.psum_scatter(
        gradient, spec.width_axes, scatter_dimension=1, tiled=True
      )
    rest = tuple(a for a in spec.token_axes if a not in spec.width_axes)
    if rest:
      gradient = jax.lax.psum(gradient, rest)
    return gradient.astype(table.dtype)

  arrays = [d_rows, tokens, table] + ([] if parts is None else [d_inlet])
  return shard(run, True)(*arrays), None


_embed.defvjp(_forward, _backward)
