"""Probes of attention layers for a curious reader: sinks, gates, maps.

Nothing here runs unless the collection `probes` or `attention_maps` is
mutable. `gated_jax/ops/probes.py` has the formulas, and
`gated_jax/evals/diagnostics.py` adds the numbers up.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.model.gate import gate_scores
from gated_jax.ops import probes
from gated_jax.ops.attention import context


def is_watched(module: nn.Module) -> bool:
  """True where somebody looks at the probes of this call."""
  return not module.is_initializing() and (
    module.is_mutable_collection('probes')
    or module.is_mutable_collection('attention_maps')
  )


def sow_gate(
  module: nn.Module,
  config: GateConfig,
  logits: Float[Array, '...'],
  valid: Bool[Array, 'B T'] | None,
) -> None:
  """Statistics of the scores, over tokens that are not padding."""
  if not is_watched(module):
    return
  scores = gate_scores(config, logits)
  if scores.ndim == 3:  # dense_output: there are no heads any more
    logits, scores = logits[:, :, None], scores[:, :, None]
  if valid is None:
    valid = jnp.ones(scores.shape[:2], bool)
  module.sow('probes', 'gate_scores', probes.score_statistics(scores, valid))
  module.sow('probes', 'gate_logit_norm', probes.logit_norm(logits, valid))


def sow_attention(
  module: nn.Module,
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  lse: Float[Array, 'B N T'],
  segments: Int[Array, 'B T'] | None,
  window: int,
) -> None:
  """First-token attention, the largest logit, and maps where asked for."""
  parts = sharding.axis_size('length')
  if parts > 1:  # back to the order of the text
    order = np.argsort(context.zigzag(query.shape[1], parts))
    query, key, lse = query[:, order], key[:, order], lse[:, :, order]
    segments = None if segments is None else segments[:, order]
  scale = query.shape[-1] ** -0.5
  arrays = (query, key, lse, segments, scale, window)
  module.sow('probes', 'first_token', probes.first_token_attention(*arrays))
  near = probes.first_token_attention(*arrays, within=probes.NEAR)
  module.sow('probes', 'first_token_near', near)
  largest = probes.largest_logit(query, key, segments, scale, window)
  module.sow('probes', 'attention_logit_max', largest)
  if module.is_mutable_collection('attention_maps'):
    maps = probes.attention_weights(*arrays)
    module.sow('attention_maps', 'attention_weights', maps)
