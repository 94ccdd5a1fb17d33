"""Rows of an embedding for tokens, where both may be split over devices.

The table is gathered along its width in the dtype of the activations; its
gradient is summed in float32, since a frequent token's row is the sum of
thousands of terms, and scattered again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

# Wraps a function for the devices that it runs on; see `embed`.
Place = Callable[[Callable[..., Any], bool], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class EmbedSpec:
  """Static options; axis names inside shard_map, '' and () without."""

  dtype: str = 'float32'  # of what comes out
  token_axes: tuple[str, ...] = ()
  vocab_axis: str = ''
  width_axes: tuple[str, ...] = ()


def here(function: Any, differentiate: bool) -> Any:
  """No devices to place anything on."""
  del differentiate
  return function


def embed(
  table: Float[Array, 'V D'],
  tokens: Int[Array, 'B T'],
  spec: EmbedSpec = EmbedSpec(),
  place: Place = here,
) -> Float[Array, 'B T D']:
  """The table's row of every token; a token below 0 or beyond V has zeros.

  Args:
    table: [V, D].
    tokens: ids.
    spec: static options.
    place: wraps a function for the devices it runs on: (table, tokens) to
      rows, or, where its second argument is true, (rows, tokens, table) to
      the table's gradient.
  """
  return _embed(spec, place, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(spec, place, table, tokens):
  def run(table, tokens):
    table = table.astype(jnp.dtype(spec.dtype))
    if spec.width_axes:
      table = jax.lax.all_gather(table, spec.width_axes, axis=1, tiled=True)
    ids, known = _local_ids(tokens, table.shape[0], spec)
    rows = jnp.where(known[..., None], jnp.take(table, ids, axis=0), 0)
    return jax.lax.psum(rows, spec.vocab_axis) if spec.vocab_axis else rows

  return place(run, False)(table, tokens)


def _local_ids(tokens, size, spec):
  """Ids in this device's part of the vocabulary, and which lie in it."""
  if spec.vocab_axis:
    tokens = tokens - jax.lax.axis_index(spec.vocab_axis) * size
  return jnp.clip(tokens, 0, size - 1), (tokens >= 0) & (tokens < size)


def _forward(spec, place, table, tokens):
  return _embed(spec, place, table, tokens), (table, tokens)


def _backward(spec, place, saved, incoming):
  table, tokens = saved

  def run(incoming, tokens, table):
    wide = jnp.promote_types(table.dtype, jnp.float32)
    ids, known = _local_ids(tokens, table.shape[0], spec)
    terms = jnp.where(known[..., None], incoming.astype(wide), 0)
    zeros = jnp.zeros((table.shape[0], terms.shape[-1]), wide)
    gradient = zeros.at[ids].add(terms)
    if spec.width_axes:
      gradient = jax.lax.psum_scatter(
        gradient, spec.width_axes, scatter_dimension=1, tiled=True
      )
    rest = tuple(a for a in spec.token_axes if a not in spec.width_axes)
    if rest:
      gradient = jax.lax.psum(gradient, rest)
    return gradient.astype(table.dtype)

  return place(run, True)(incoming, tokens, table), None


_embed.defvjp(_forward, _backward)
