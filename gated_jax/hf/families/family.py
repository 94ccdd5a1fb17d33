"""The form of a family's row in the table, and what families share.

Read `gated_jax/hf/config.py` next, which reads and writes a config.json by it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from gated_jax.config import ModelConfig
from gated_jax.hf.keys import Keys
from gated_jax.hf.names import Row

# Keys of experts that a config.json may have where the model has none.
UNUSED_EXPERTS = frozenset(
  {
    'num_experts',
    'num_experts_per_tok',
    'num_shared_experts',
    'moe_intermediate_size',
    'shared_expert_intermediate_size',
    'norm_topk_prob',
    'route_scale',
    'router_aux_loss_coef',
    'decoder_sparse_step',
  }
)


@dataclasses.dataclass(frozen=True)
class Family:
  """How a kind of model is named and described elsewhere.

  Attributes:
    name: On our command line.
    model_type, architecture: In config.json.
    rows: Its tensors, as they are written.
    other_rows: Tables that files may follow instead.
    read: From its own keys and the number of layers, settings of ours.
    write: Its own keys; None: files of this form hold more than a language
      model, and are only read.
    fraction: partial_rotary_factor where config.json has none.
    inert: Keys of its own that change no logits.
    marks: Keys of which one tells it from another of the same architecture.
    inside: The model_type of `text_config`, which then holds the keys; '':
      they stand at the top.
    around: What else stands at the top then. Its values are written and are
      not read: they belong to parts that are no language model.
    aside: Patterns of the names of tensors that no logits of text depend on.
  """

  name: str
  model_type: str
  architecture: str
  rows: tuple[Row, ...]
  read: Callable[[Keys, int], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]] | None = None
  fraction: float = 1.0
  inert: frozenset[str] = frozenset()
  marks: frozenset[str] = frozenset()
  inside: str = ''
  around: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  aside: tuple[str, ...] = ()
  other_rows: tuple[tuple[Row, ...], ...] = ()


def interval(depth: int, every: int, kind: str) -> list[str]:
  """Every n-th layer attends to all, the others are of a kind."""
  return [
    kind if (layer + 1) % every else 'full_attention' for layer in range(depth)
  ]
