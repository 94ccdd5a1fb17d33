"""Attention with all of its weights in memory, by Flax's own function.

For what needs the weights themselves: dropout as Flax draws it, a look at
them, products of a chosen precision. `attend.py` is the way without.
"""

from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.model.gate import apply_gate
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.ops.attention.masks import visible_keys
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking


class Weighing(NamedTuple):
  """Arguments of `nn.dot_product_attention` that are not the layer's."""

  broadcast_dropout: bool = True
  dropout_rng: Any = None
  precision: Any = None
  sower: nn.Module | None = None  # keeps the weights in 'intermediates'


def weigh(
  layer: AttentionLayer,
  batch: tuple[int, ...],
  arrays: tuple[Array, Array, Array, Array | None],
  mask: Bool[Array, '#B #N #T S'] | None,
  weighing: Weighing,
) -> Float[Array, 'B T N H']:
  """Attention output, gated where the gate stands at sdpa_output.

  Args:
    layer: sizes and kinds.
    batch: batch axes as the caller has them, which Flax's function sees.
    arrays: query [B, T, N, H], key and value [B, S, K, H], gate logits or None.
    mask: True where a query sees a key.
    weighing: options of Flax's function.
  """
  query, key, value, logits = arrays
  copies = layer.heads // layer.kv_heads
  key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
  spec = AttentionSpec(causal=layer.causal, window=layer.window)
  masking = Masking(mask=mask)
  visible = visible_keys(query.shape[1], key.shape[1], masking, spec)

  def apart(x: Array) -> Array:
    """Batch axes apart again, as the caller has them."""
    rows = batch if x.shape[0] == query.shape[0] else (1,) * len(batch)
    return x.reshape(*rows, *x.shape[1:])

  output = nn.dot_product_attention(
    apart(query),
    apart(key),
    apart(value),
    mask=None if visible is None else apart(visible),
    broadcast_dropout=weighing.broadcast_dropout,
    dropout_rng=weighing.dropout_rng,
    dropout_rate=layer.dropout,
    deterministic=not layer.dropout,
    dtype=layer.dtype,
    precision=weighing.precision,
    module=weighing.sower,
    force_fp32_for_softmax=True,
  )
  output = output.reshape(query.shape).astype(query.dtype)
  if visible is not None:
    seen = jnp.any(visible, axis=-1).swapaxes(1, 2)
    output = jnp.where(seen[..., None], output, 0)
  return output if logits is None else apply_gate(layer.gate, output, logits)
