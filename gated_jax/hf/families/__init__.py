"""The table of families: what config.json and its tensors say of each.

A family's `read` turns its own keys into settings and refuses by name what
the decoder cannot compute; `write` is the inverse. The order is that of choice
on export.
"""

from gated_jax.hf.families.afmoe import AFMOE
from gated_jax.hf.families.family import Family
from gated_jax.hf.families.laguna import LAGUNA
from gated_jax.hf.families.muse import MUSE_GLIMMER
from gated_jax.hf.families.qwen3 import GATED_QWEN3
from gated_jax.hf.families.qwen3 import QWEN3
from gated_jax.hf.families.qwen3 import QWEN3_MOE
from gated_jax.hf.families.qwen3_next import QWEN3_5
from gated_jax.hf.families.qwen3_next import QWEN3_5_MOE
from gated_jax.hf.families.qwen3_next import QWEN3_5_MOE_PUBLISHED
from gated_jax.hf.families.qwen3_next import QWEN3_5_PUBLISHED
from gated_jax.hf.families.qwen3_next import QWEN3_NEXT
from gated_jax.hf.families.step import STEP

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
)
