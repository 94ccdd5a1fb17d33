"""Named shapes of attention, for tests and benches: one table for all.

Small cases run on a CPU, kernels interpreted. The ones marked `compile_only`
are what real models ask for: too large here, but the TPU compiler takes them
without a TPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.gate import GateSpec


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of attention: sizes by their letters, then its options."""

  B: int = 2
  T: int = 128
  S: int = 0  # 0: as T
  N: int = 4
  K: int = 2
  H: int = 64
  V: int = 0  # width of values; 0: as H
  causal: bool = True
  window: int = 0
  # 'none', 'packed' (several documents in each row, padding behind them),
  # 'blind' (some queries share no document with any key), 'hidden' (a part of
  # the keys belongs to the first row's only document, all others to none).
  segments: str = 'none'
  query_offset: bool = False
  gate: str = 'none'  # 'elementwise' and 'headwise' are the others
  activation: str = 'sigmoid'
  additive: bool = False
  model_dtype: bool = False
  dtype: str = 'float32'
  compile_only: bool = False

  @property
  def keys(self) -> int:
    """Number of keys."""
    return self.S or self.T

  @property
  def values(self) -> int:
    """Width of values and of the output."""
    return self.V or self.H

  @property
  def output_shape(self) -> tuple[int, ...]:
    """[B, T, N, V], which is the shape of the output's gradient too."""
    return self.B, self.T, self.N, self.values

  @property
  def spec(self) -> AttentionSpec:
    """The static options, with the log-sum-exp asked for."""
    return AttentionSpec(
      causal=self.causal,
      window=self.window,
      return_lse=True,
      gate=GateSpec(self.activation, self.additive, self.model_dtype),
    )

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of `Inputs` that the case has."""
    shapes: dict[str, tuple[int, ...]] = {
      'query': (self.B, self.T, self.N, self.H),
      'key': (self.B, self.keys, self.K, self.H),
      'value': (self.B, self.keys, self.K, self.values),
    }
    if self.gate != 'none':
      width = 1 if self.gate == 'headwise' else self.values
      shapes['gate_logits'] = (self.B, self.T, self.N, width)
    return shapes

  def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes without numbers, to compile with."""
    dtype = jnp.dtype(self.dtype)
    return {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, shape in self.shapes.items()
    }

  def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
    """Normal numbers for each of `shapes`."""
    rng = np.random.default_rng(seed)
    return {
      name: jnp.asarray(rng.normal(size=shape), self.dtype)
      for name, shape in self.shapes.items()
    }

  def masking(self) -> Masking:
    """Segments and offsets, the same at every call."""
    offset = None
    if self.query_offset:
      offset = jnp.asarray(np.arange(self.B) * 3 + 1, jnp.int32)
    if self.segments == 'none':
      return Masking(query_offset=offset)
    query = np.stack([_documents(self.T, row) for row in range(self.B)])
    kv = np.stack([_documents(self.keys, row) for row in range(self.B)])
    if self.segments == 'blind':
      query[:, self.T // 3 : self.T // 2] = 99
    if self.segments == 'hidden':
      query[:], kv[:] = 0, -1
      kv[0, self.keys // 4 : self.keys // 2] = 0
    return Masking(
      jnp.asarray(query, jnp.int32),
      jnp.asarray(kv, jnp.int32),
      query_offset=offset,
    )


def _documents(length: int, row: int) -> np.ndarray:
  """Numbers 1, 1, .., 2, 2, .., 3, .., 0: three documents, then padding."""
  cuts = [(length * (3 + row)) // 16, (length * (9 + row)) // 16]
  cuts.append(length - length // 8)
  index = np.arange(length)
  number = 1 + sum((index >= cut).astype(np.int32) for cut in cuts)
  return np.where(index >= cuts[-1], 0, number)


_GATED: dict[str, Any] = {'gate': 'elementwise'}
_TINY: dict[str, Any] = {'B': 2, 'T': 24, 'N': 4, 'K': 2, 'H': 16}
_REAL: dict[str, Any] = {'dtype': 'bfloat16', 'compile_only': True}
_1B7: dict[str, Any] = {'N': 16, 'K': 8, 'H': 128, **_REAL}
_15B: dict[str, Any] = {'N': 32, 'K': 4, 'H': 128, **_REAL}

CASES: dict[str, Case] = {
  # Masks.
  'plain': Case(),
  'full': Case(causal=False),
  'window': Case(window=40),
  'window_of_one': Case(window=1, T=64),
  'packed': Case(segments='packed', **_GATED),
  'packed_window': Case(segments='packed', window=20, gate='headwise'),
  'blind': Case(segments='blind', **_GATED),
  'blind_full': Case(segments='blind', causal=False, gate='headwise'),
  'hidden': Case(segments='hidden', causal=False, S=128, gate='headwise'),
  'offset': Case(T=16, S=64, query_offset=True, **_GATED),
  'offset_window': Case(T=16, S=64, query_offset=True, window=9),
  # Lengths.
  'odd_length': Case(T=100, **_GATED),
  'two_blocks': Case(T=200, B=1, **_GATED),
  'many_blocks': Case(T=1200, B=1, N=2, K=1, H=64, gate='headwise'),
  'one_token': Case(T=1, S=1, **_GATED),
  'cross': Case(T=48, S=130, causal=False, **_GATED),
  'cross_causal': Case(T=48, S=130, **_GATED),
  'cross_longer_queries': Case(T=130, S=48, **_GATED),
  'cross_window': Case(T=130, S=48, window=16, gate='headwise'),
  'cross_packed': Case(T=70, S=130, causal=False, segments='packed'),
  # Heads.
  'ungrouped': Case(N=3, K=3, **_GATED),
  'one_kv_head': Case(N=4, K=1, **_GATED),
  'head_dim_128': Case(H=128, N=2, K=1, **_GATED),
  'head_dim_256': Case(H=256, N=2, K=1, B=1, **_GATED),
  'head_dim_odd': Case(**{**_TINY, 'H': 6}, **_GATED),
  'narrow_values': Case(V=24, **_GATED),
  'wide_values': Case(**_TINY, V=160, gate='headwise', window=9),
  'wide_values_packed': Case(H=24, V=40, N=4, K=1, segments='packed'),
  # Precision.
  'bf16': Case(dtype='bfloat16', **_GATED),
  'bf16_headwise': Case(dtype='bfloat16', gate='headwise', window=50),
  'bf16_rounded': Case(dtype='bfloat16', model_dtype=True, **_GATED),
  'bf16_rounded_headwise': Case(
    dtype='bfloat16', model_dtype=True, gate='headwise'
  ),
  'bf16_packed': Case(dtype='bfloat16', segments='packed', N=4, K=1, **_GATED),
  'f16': Case(dtype='float16', **_GATED),
  # Every activation, every way to apply it.
  **{
    f'{gate}_{"plus" if additive else "times"}_{activation}': Case(
      gate=gate, activation=activation, additive=additive, **_TINY
    )
    for gate in ('elementwise', 'headwise')
    for additive in (False, True)
    for activation in (
      'sigmoid',
      'silu',
      'identity',
      'ns_sigmoid',
      'two_sigmoid',
      'softplus',
    )
  },
  # The paper's models: dense 1.7B, and 15B with 2.54B active.
  'dense_1b7': Case(B=4, T=4096, **_1B7),
  'dense_1b7_elementwise': Case(B=4, T=4096, gate='elementwise', **_1B7),
  'dense_1b7_headwise': Case(B=4, T=4096, gate='headwise', **_1B7),
  'dense_1b7_packed': Case(
    B=4, T=4096, gate='elementwise', segments='packed', **_1B7
  ),
  'dense_1b7_window': Case(
    B=4, T=4096, gate='elementwise', window=1024, **_1B7
  ),
  'dense_1b7_32k': Case(B=1, T=32768, gate='elementwise', **_1B7),
  'dense_1b7_128k': Case(B=1, T=131_072, gate='elementwise', **_1B7),
  # Latent attention as DeepSeek has it: values without the rotated channels.
  'latent': Case(B=2, T=4096, N=16, K=16, H=192, V=128, **_GATED, **_REAL),
  'moe_15b': Case(B=2, T=4096, gate='elementwise', **_15B),
  'moe_15b_packed': Case(
    B=2, T=4096, gate='headwise', segments='packed', **_15B
  ),
}
