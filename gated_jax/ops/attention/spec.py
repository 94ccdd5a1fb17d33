"""What every attention backend is told, and what it must answer.

A backend is one file with one function

    attend(query, key, value, gate, masking, spec) -> (output, lse)

over arrays in the layout that the projections make:

    query [B, T, N, H]    key, value [B, S, K, H]    N a multiple of K
    gate  [B, T, N, H] (elementwise), [B, T, N, 1] (headwise), or None
    output [B, T, N, H] in query's dtype
    lse    [B, N, T] float32: log(sum(exp(scale * q.k))) over the visible
           keys, natural logarithm, or None unless spec.return_lse

Query head n reads kv head n // (N / K). A query that sees no key outputs
zero before the gate and has lse -inf. What a backend cannot do it refuses
with NotImplementedError and the reason; `xla` can do everything and defines
what is right.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.gate import GateSpec

# What backward keeps, under these names for remat policies. A policy that
# saves both never runs attention's forward a second time.
OUTPUT_NAME = 'gated_output'
LSE_NAME = 'attention_lse'


class Masking(NamedTuple):
  """Arrays that say which keys a query sees; all that are given must agree."""

  # Same number, same document. Both or neither.
  query_segments: Int[Array, 'B T'] | None = None
  kv_segments: Int[Array, 'B S'] | None = None
  # Index among the keys of each row's first query; 0 where it is absent.
  # Causality and window compare query_offset + t with s.
  query_offset: Int[Array, ' B'] | None = None
  # Any other rule; True is visible.
  mask: Bool[Array, '#B #N #T S'] | None = None
  # PRNG key, used where spec.dropout > 0.
  dropout_key: Any = None


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Static options of one call."""

  causal: bool = True
  window: int = 0  # keys a query sees, itself included; 0: all. Causal only
  scale: float = 0.0  # of the logits; 0: H ** -0.5
  dropout: float = 0.0  # of attention weights
  return_lse: bool = False
  gate: GateSpec = GateSpec()

  def __post_init__(self):
    if self.window < 0:
      raise ValueError(f'window={self.window} must not be negative')
    if self.window and not self.causal:
      raise ValueError(f'window={self.window} needs causal=True')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} must lie in [0, 1)')

  def logit_scale(self, head_dim: int) -> float:
    """What q.k is multiplied with."""
    return self.scale or head_dim**-0.5


class Result(NamedTuple):
  """Attention's output, and its log-sum-exp where it was asked for."""

  output: Float[Array, 'B T N H']
  lse: Float[Array, 'B N T'] | None


def refuse(backend: str, **reasons: bool) -> None:
  """Raises NotImplementedError for the first reason that holds."""
  for reason, holds in reasons.items():
    if holds:
      raise NotImplementedError(
        f'{backend} attention cannot do this: {reason.replace("_", " ")}'
      )
