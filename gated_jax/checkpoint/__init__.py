"""Checkpoints as folders: where they lie, how to read, check and write one.

`folder.py` finds them and reads what they say of themselves, `sums.py` sums
arrays, so that damage is found. What did not train may lie in another
checkpoint, the base (`base.py`); `parameters.py` reads and writes both.
A training run keeps its optimizer and its place in the data beside them: see
gated_jax/training/checkpoints.py.
"""

from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import find
from gated_jax.checkpoint.folder import read_run
from gated_jax.checkpoint.parameters import TOKENIZER
from gated_jax.checkpoint.parameters import load_config
from gated_jax.checkpoint.parameters import load_parameters
from gated_jax.checkpoint.parameters import save_parameters

__all__ = [
  'TOKENIZER',
  'CheckpointError',
  'find',
  'load_config',
  'load_parameters',
  'read_run',
  'save_parameters',
]
