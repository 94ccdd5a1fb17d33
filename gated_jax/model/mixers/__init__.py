"""The table of mixers: the word in a pattern, and the module it names."""

import difflib

from gated_jax.model.mixer import Mixer
from gated_jax.model.mixers.gated_deltanet import GatedDeltaNet
from gated_jax.model.mixers.self_attention import SelfAttention
from gated_jax.model.mixers.short_conv import ShortConv

MIXERS: dict[str, type[Mixer]] = {
  'attention': SelfAttention,
  'gated_deltanet': GatedDeltaNet,
  'short_conv': ShortConv,
}


def mixer_named(word: str) -> type[Mixer]:
  """The module that a layer's word names; ValueError where there is none."""
  if word not in MIXERS:
    near = difflib.get_close_matches(word, sorted(MIXERS), n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise ValueError(
      f'a word of model.pattern names the mixer {word!r}, and there are '
      f'{", ".join(sorted(MIXERS))}{hint}'
    )
  return MIXERS[word]
