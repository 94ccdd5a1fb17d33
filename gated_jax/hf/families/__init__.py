"""The table of families: what config.json and its tensors say of each.

A family's `read` turns its own keys into settings and refuses by name what
the decoder cannot compute; `write` is the inverse. The order is that of choice
on export.
"""

from gated_jax.hf.families.afmoe import AFMOE
from gated_jax.hf.families.beam import BEAM
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.laguna import LAGUNA
from gated_jax.hf.families.lfm3 import LFM3
from gated_jax.hf.families.muse import MUSE_GLIMMER
from gated_jax.hf.families.muse_spark import MUSE_SPARK
from gated_jax.hf.families.olmo_hybrid import OLMO_HYBRID
from gated_jax.hf.families.qwen3 import GATED_QWEN3
from gated_jax.hf.families.qwen3 import QWEN3
from gated_jax.hf.families.qwen3 import QWEN3_MOE
from gated_jax.hf.families.qwen3_next import QWEN3_5
from gated_jax.hf.families.qwen3_next import QWEN3_5_MOE
from gated_jax.hf.families.qwen3_next import QWEN3_5_MOE_PUBLISHED
from gated_jax.hf.families.qwen3_next import QWEN3_5_PUBLISHED
from gated_jax.hf.families.qwen3_next import QWEN3_NEXT
from gated_jax.hf.families.step import STEP

_LATENT = 'its attention reads keys and values from a small latent (MLA)'
_KDA = 'its linear layers forget by channel (KDA)'
# Why the decoder cannot be a model of these types, which have the gate as well.
NOT_YET: dict[str, str] = {
  'axk2': _LATENT,
  'bailing_hybrid': _KDA,
  'dory': 'its attention is normed over all heads together (nGPT)',
  'dots3_note': _LATENT,
  'glm5_next': _KDA,
  'hrm_text': 'its two stacks of layers run several times',
  'hy_v4': _LATENT,
  'hy_v4_vl': _LATENT,
  'inkling2': 'its attention has biases by distance, its residual stream sums',
  'kimi_linear': _KDA,
  'minimax': 'its linear layers are lightning attention',
  'neomme': 'it is an encoder, whose tokens see those after them',
  'qwen4_exp': 'its attention chooses tokens, its residual stream has gates',
}
FAMILIES: tuple[Family, ...] = (
  QWEN3,
  QWEN3_MOE,
  GATED_QWEN3,
  QWEN3_5,
  QWEN3_5_MOE,
  QWEN3_5_PUBLISHED,
  QWEN3_5_MOE_PUBLISHED,
  QWEN3_NEXT,
  AFMOE,
  MUSE_GLIMMER,
  LAGUNA,
  STEP,
  LFM3,
  BEAM,
  OLMO_HYBRID,
  MUSE_SPARK,
)
