"""The rules of `Masking` and `AttentionSpec` as matrices; True is visible."""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool

from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking


def causal_keys(
  queries: int, keys: int, masking: Masking, spec: AttentionSpec
) -> list[Bool[Array, '#B 1 T S']]:
  """The matrices of causality and of the window, where the spec has them."""
  if not spec.causal:
    return []
  offset = masking.query_offset
  if offset is None:
    offset = jnp.zeros(1, jnp.int32)
  t = jnp.arange(queries)[:, None] + offset[:, None, None, None]
  s = jnp.arange(keys)
  rules = [s <= t]
  if spec.window:
    rules.append(t - s < spec.window)
  return rules


def given_keys(masking: Masking) -> list[Bool[Array, '#B #N #T S']]:
  """The matrices of segments and of the explicit mask, where there are any."""
  rules = []
  if masking.query_segments is not None:
    assert masking.kv_segments is not None
    rules.append(
      masking.query_segments[:, None, :, None]
      == masking.kv_segments[:, None, None, :]
    )
  if masking.mask is not None:
    rules.append(masking.mask)
  return rules


def all_of(rules: list[Array]) -> Bool[Array, '#B #N #T S'] | None:
  """The keys that every rule allows; None: there are no rules."""
  if not rules:
    return None
  visible = rules[0]
  for rule in rules[1:]:
    visible = visible & rule
  return visible


def visible_keys(
  queries: int, keys: int, masking: Masking, spec: AttentionSpec
) -> Bool[Array, '#B #N T S'] | None:
  """Which keys each query sees; None: all of them."""
  return all_of(causal_keys(queries, keys, masking, spec) + given_keys(masking))
