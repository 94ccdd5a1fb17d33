"""Everything that callers of `GatedAttention` may pass, in one form."""

import difflib
import math
from typing import Any
from typing import Literal
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.config import GateConfig

# Names of gates: none at all, one of the granularities on the
# attention output, or one of the other positions.
GateWord = Literal[
  'none',
  'elementwise',
  'headwise',
  'query',
  'key',
  'value',
  'sdpa_output',
  'dense_output',
]


def gate_of(gate: GateConfig | GateWord) -> GateConfig:
  """The config that a word stands for.

  Raises:
    ValueError: the word says no gate.
    TypeError: neither a word nor a config.
  """
  if isinstance(gate, GateConfig):
    return gate
  words = get_args(GateWord)
  if not isinstance(gate, str):
    raise TypeError(
      f'gate={gate!r} must be a GateConfig or one of {", ".join(words)}'
    )
  if gate not in words:
    near = difflib.get_close_matches(gate, words, n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise ValueError(f'gate={gate!r} must be one of {", ".join(words)}{hint}')
  if gate in ('elementwise', 'headwise'):
    return GateConfig(granularity=gate)
  return GateConfig(position=gate)


def three_inputs(
  inputs_q: Array,
  inputs_k: Array | None,
  inputs_v: Array | None,
  inputs_kv: Array | None,
) -> tuple[Array, Array, Array]:
  """The inputs of queries, keys and values, with one batch axis each.

  An array that is given twice comes back as one.

  Raises:
    ValueError: arguments that exclude each other, or shapes that do not fit.
  """
  if inputs_kv is not None:
    if inputs_k is not None or inputs_v is not None:
      raise ValueError('inputs_kv excludes inputs_k and inputs_v')
    inputs_k = inputs_kv
  if inputs_k is None and inputs_v is not None:
    raise ValueError('inputs_v needs inputs_k: give one array as inputs_k')
  inputs_k = inputs_q if inputs_k is None else inputs_k
  inputs_v = inputs_k if inputs_v is None else inputs_v
  arrays = {'inputs_q': inputs_q, 'inputs_k': inputs_k, 'inputs_v': inputs_v}
  for name, array in arrays.items():
    if jnp.ndim(array) < 2:
      raise ValueError(
        f'{name} of shape {jnp.shape(array)} must be [*batch, length, features]'
      )
    if array.shape[:-2] != inputs_q.shape[:-2]:
      raise ValueError(
        f'{name} of shape {array.shape} must have the batch axes of inputs_q, '
        f'{inputs_q.shape[:-2]}'
      )
  if inputs_k.shape[-2] != inputs_v.shape[-2]:
    raise ValueError(
      f'inputs_k of shape {inputs_k.shape} and inputs_v of shape '
      f'{inputs_v.shape} must be of one length'
    )
  joined = {id(x): one_batch_axis(x) for x in arrays.values()}
  query, key, value = (joined[id(x)] for x in arrays.values())
  return query, key, value


def one_batch_axis(x: Float[Array, '*B T D']) -> Float[Array, 'b T D']:
  """x with its batch axes, if there are any, joined in one."""
  return x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])


def one_mask(
  mask: Any, batch: tuple[int, ...], heads: int, queries: int, keys: int
) -> Bool[Array, '#b #N #T S']:
  """The mask as a backend takes it.

  Args:
    mask: of booleans, or numbers that are not zero where a query sees a key;
      of a shape that broadcasts against [*batch, heads, queries, keys].
    batch: batch axes of the inputs.
    heads, queries, keys: how many there are.

  Raises:
    ValueError: the shape does not broadcast.
  """
  whole = (*batch, heads, queries, keys)
  mask = jnp.asarray(mask)
  fits = mask.ndim <= len(whole) and all(
    size in (1, full)
    for size, full in zip(mask.shape[::-1], whole[::-1], strict=False)
  )
  if not fits:
    raise ValueError(
      f'mask of shape {mask.shape} must broadcast against '
      f'[*batch, heads, queries, keys] = {whole}'
    )
  mask = mask.astype(bool)
  mask = mask.reshape((1,) * (len(whole) - mask.ndim) + mask.shape)
  *rows, some_heads, some_queries, some_keys = mask.shape
  if some_keys != keys:
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys))
  if math.prod(rows) > 1 and tuple(rows) != batch:
    mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
  return mask.reshape(-1, some_heads, some_queries, keys)
