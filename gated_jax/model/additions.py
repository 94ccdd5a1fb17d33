"""What a model that was trained without it can be given later.

An adapter begins as zero, and a gate can begin open (`gate.init='zeros'` with
`gate.activation='two_sigmoid'`): the function is the same at first. Whoever
adds a gate that begins otherwise changes the function knowingly.
"""

from gated_jax.model import adapters
from gated_jax.model.patterns import Path

NAMES = 'adapters and gates'


def can_be_added(path: Path) -> bool:
  """True for a parameter of an adapter or a gate.

  Args:
    path: where it lies in the tree.
  """
  return adapters.is_adapter(path) or 'gate' in path[:-1]
