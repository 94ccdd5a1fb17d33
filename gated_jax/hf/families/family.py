"""The form of a family's row in the table, and what families share.

Read `gated_jax/hf/config.py` next, which reads and writes a config.json by it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.config import lead_and_pattern
from gated_jax.config import word_of
from gated_jax.hf.keys import SAME
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
    theta: rope_theta of a class that fills in rope_parameters itself where it
      has none, and so never sees an older spelling; 0: it reads both.
    inert: Keys of its own that change no logits.
    marks: Keys of which one tells it from another of the same architecture.
    inside: The model_type of `text_config`, which then holds the keys; '':
      they stand at the top.
    around: What else stands at the top then. Its values, or what functions
      make them of the model, are written and are not read: they belong to
      parts that are no language model.
    aside: Patterns of the names of tensors that no logits of text depend on.
    after: The same, with {layer} for a layer beyond the last one.
    aliases: Older names of keys, each with the one that `read` knows.
    spelled: Keys that families have in common, each with its own word for it,
      which stands in its files.
    tied: tie_word_embeddings where config.json has none.
    rope_by_type: Types of layers have their own rotary embeddings, which
      `read` and `write` deal with.
    divides_width: head_dim is hidden_size by num_attention_heads where it is
      absent, and there are as many heads of keys where their number is.
    modules: Parts of the names of tensors, each with what transformers has in
      its place once the model is loaded; PEFT is told of modules.
    about: What is in such models, for a reader.
    limits: What is set aside or refused, and why, for a reader.
  """

  name: str
  model_type: str
  architecture: str
  rows: tuple[Row, ...]
  read: Callable[[Keys, int], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]] | None = None
  fraction: float = 1.0
  theta: float = 0.0
  inert: frozenset[str] = frozenset()
  marks: frozenset[str] = frozenset()
  inside: str = ''
  around: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  aside: tuple[str, ...] = ()
  other_rows: tuple[tuple[Row, ...], ...] = ()
  after: tuple[str, ...] = ()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  spelled: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied: bool = False
  rope_by_type: bool = False
  divides_width: bool = False
  modules: tuple[tuple[str, str], ...] = ()
  about: str = ''
  limits: str = ''


def interval(depth: int, every: int, kind: str) -> list[str]:
  """Every n-th layer attends to all, the others are of a kind."""
  return [
    kind if (layer + 1) % every else 'full_attention' for layer in range(depth)
  ]


def experts_by_scores(keys: Keys, **names: Any) -> dict[str, Any]:
  """Settings of experts that sigmoid scores and a trained bias choose.

  Args:
    keys: Of config.json.
    **names: What the family adds to them.
  """
  return {
    'experts': keys.integer('num_experts'),
    'top_k': keys.integer('num_experts_per_tok'),
    'width': keys.integer('moe_intermediate_size'),
    'score': 'sigmoid',
    'bias': True,
    **names,
  }


def in_words(
  keys: Keys, layers: Sequence[LayerSpec], rope: RopeConfig, moe: dict[str, Any]
) -> dict[str, Any]:
  """Settings that make these layers, in the fewest words.

  Args:
    keys: Of config.json, of which the common ones are taken.
    layers: All of them.
    rope: The model's; words make those of the layers from it.
    moe: Settings of the experts of those layers that have some.
  """
  sizes = {ours: keys.taken[theirs] for theirs, ours in SAME.items()}
  plain = ModelConfig(
    **{**sizes, 'depth': 1},
    pattern=('attention+moe',),
    rope=rope,
    moe=MoEConfig(**moe),
  )
  words = [word_of(layer, plain) for layer in layers]
  lead, pattern = lead_and_pattern(words)
  sparse = any(layer.ffn == 'moe' for layer in layers)
  return {
    'lead': lead,
    'pattern': pattern,
    'rope': dataclasses.asdict(rope),
    **({'moe': moe} if sparse else {}),
  }
