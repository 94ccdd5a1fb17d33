"""The interface of every attention backend: inputs, options and results.

A backend is one file with one function

    attend(inputs, masking, spec) -> Result(output, lse)

over arrays in the layout that the projections make:

    query        [B, T, N, H]
    key          [B, S, K, H]    N is a multiple of K
    value        [B, S, K, V]    V, the width of a value, may differ from H
    gate_logits  [B, T, N, V] (elementwise), [B, T, N, 1] (headwise), or None
    output       [B, T, N, V] in query's dtype
    lse          [B, N, T] float32: log(sum(exp(scale * q.k))) over the visible
                 keys, natural logarithm, or None unless spec.return_lse

Query head n reads kv head n // (N / K). A query that sees no key outputs
zero before the gate and has lse -inf. What a backend cannot do it refuses
with NotImplementedError and the reason; `xla` can do everything and defines
what is right.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.gate import GateSpec

# Remat policies know attention's results by these names. A policy that saves
# both never runs attention's forward a second time.
OUTPUT_NAME = 'gated_output'
LSE_NAME = 'attention_lse'


class Inputs(NamedTuple):
  """The arrays that attention is a differentiable function of."""

  query: Float[Array, 'B T N H']
  key: Float[Array, 'B S K H']
  value: Float[Array, 'B S K V']
  gate_logits: Float[Array, 'B T N #V'] | None = None


class Masking(NamedTuple):
  """Arrays that say which keys a query sees; all that are given must agree."""

  # Tokens with the same number belong to the same document. Both or neither.
  query_segments: Int[Array, 'B T'] | None = None
  kv_segments: Int[Array, 'B S'] | None = None
  # Index among the keys of each row's first query; None means 0. Causality and
  # window compare query_offset + t with s.
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
  scale: float = 0.0  # between q.k and attention logits; 0: H ** -0.5
  dropout: float = 0.0  # rate at which attention weights are dropped
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
    """The factor between q.k and an attention logit."""
    return self.scale or head_dim**-0.5


class Result(NamedTuple):
  """Attention's output, and its log-sum-exp where it was asked for."""

  output: Float[Array, 'B T N V']
  lse: Float[Array, 'B N T'] | None


Attend = Callable[[Inputs, Masking, AttentionSpec], Result]


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to compute attention: a row of `api.BACKENDS`."""

  attend: Attend
  platform: str = ''  # the only one it runs on; '': it runs on any
  # Whether steps that segments hide entirely are not computed.
  skips_hidden: bool = False
  # Attention of one query to a cache whose pages are read only where they are
  # needed, with the signature of `decode_tpu.attend`; None: it has none.
  read_pages: Callable[..., Array] | None = None

  @property
  def on_tpu(self) -> bool:
    """True for kernels that run on TPUs only."""
    return self.platform == 'tpu'


def refuse(backend: str, **reasons: bool) -> None:
  """Raises NotImplementedError for the first reason that holds."""
  for reason, holds in reasons.items():
    if holds:
      raise NotImplementedError(
        f'{backend} attention cannot do this: {reason.replace("_", " ")}'
      )
