"""Every setting of a run: frozen dataclasses, their defaults, their checks.

One default stands in one place, and that place is here. Nothing in this folder
touches JAX or a file, so it imports in a moment and can be tested alone.
`gate.py` comes first because it is what the project is about, then `stack.py`
(a layer in a word), `model.py`, `data.py` and `run.py`; `roles.py` says what a
setting decides, `convert.py` is for files and flags.

Lengths are in tokens, rates per optimizer step, sizes in elements unless a
comment says otherwise. A value of 0, '' or 'none' means "off" or "derive it".
"""

from gated_jax.config.convert import differences
from gated_jax.config.convert import from_dict
from gated_jax.config.convert import to_dict
from gated_jax.config.convert import upgrade
from gated_jax.config.data import DataConfig
from gated_jax.config.function import different_function
from gated_jax.config.gate import GateConfig
from gated_jax.config.layers import ConvConfig
from gated_jax.config.layers import DeltaConfig
from gated_jax.config.layers import MoEConfig
from gated_jax.config.layers import RopeConfig
from gated_jax.config.lora import LoraConfig
from gated_jax.config.model import ModelConfig
from gated_jax.config.overrides import override
from gated_jax.config.roles import names_with
from gated_jax.config.run import CheckpointConfig
from gated_jax.config.run import MeshConfig
from gated_jax.config.run import OptimizerConfig
from gated_jax.config.run import RunConfig
from gated_jax.config.stack import LayerSpec
from gated_jax.config.stack import lead_and_pattern
from gated_jax.config.stack import shortest_pattern
from gated_jax.config.stack import word_of

__all__ = [
  'CheckpointConfig',
  'ConvConfig',
  'DataConfig',
  'DeltaConfig',
  'GateConfig',
  'LayerSpec',
  'LoraConfig',
  'MeshConfig',
  'MoEConfig',
  'ModelConfig',
  'OptimizerConfig',
  'RopeConfig',
  'RunConfig',
  'differences',
  'different_function',
  'from_dict',
  'lead_and_pattern',
  'names_with',
  'override',
  'shortest_pattern',
  'to_dict',
  'upgrade',
  'word_of',
]
