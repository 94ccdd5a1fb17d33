"""Which tensor of theirs holds which parameters of ours: tables of names.

A row serves both directions. What it says about a tensor is data, so that
reading, writing and the expected shape are three views of the same row:

    inputs=1   a weight [rows, columns] is our kernel [columns, ...] transposed
    inputs=2   the same, our first two axes being the columns ([N, H, D])
    inputs=0   stored as it is
    groups     a weight that holds several kernels has its rows in that many
               groups, each of them [first | second]

So the layouts in which others keep the gate within `q_proj` differ by one
word: the authors' models group rows by kv head, Qwen3-Next by query head.
Read `gated_jax/hf/families.py` next.
"""

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gated_jax.config import ModelConfig
from gated_jax.model import tree

Shape = tuple[int, ...]


class Row(NamedTuple):
  """One kind of tensor.

  Attributes:
    theirs: Its name; {layer} and {expert} stand for numbers.
    ours: Paths of the parameters it holds, within the layer where it has
      one. It exists where the first of them does, and holds those that do.
    inputs, groups: As above; groups is the name of a setting of the model.
  """

  theirs: str
  ours: tuple[str, ...]
  inputs: int = 1
  groups: str = ''


def _layer(*rows: Row) -> tuple[Row, ...]:
  return tuple(
    row._replace(theirs=f'model.layers.{{layer}}.{row.theirs}') for row in rows
  )


_COMMON = (
  Row('model.embed_tokens.weight', ('embed/embedding',), inputs=0),
  Row('model.norm.weight', ('final_norm/scale',), inputs=0),
  Row('lm_head.weight', ('unembed/kernel',)),
  *_layer(
    Row('input_layernorm.weight', ('attention_norm/scale',), inputs=0),
    Row('self_attn.k_proj.weight', ('attention/key/kernel',)),
    Row('self_attn.v_proj.weight', ('attention/value/kernel',)),
    Row('self_attn.o_proj.weight', ('attention/out/kernel',), inputs=2),
    Row('self_attn.q_norm.weight', ('attention/query_norm/scale',), inputs=0),
    Row('self_attn.k_norm.weight', ('attention/key_norm/scale',), inputs=0),
  ),
)
_PLAIN_QUERY = _layer(
  Row('self_attn.q_proj.weight', ('attention/query/kernel',)),
)
_FUSED_QUERY = Row(
  'self_attn.q_proj.weight',
  ('attention/query/kernel', 'attention/gate/kernel'),
)
_SEPARATE_GATE = _layer(
  Row('self_attn.gate_proj.weight', ('attention/gate/kernel',)),
)
_PRE_NORM = _layer(
  Row('post_attention_layernorm.weight', ('mlp_norm/scale',), inputs=0),
)
_SANDWICH_NORM = _layer(
  Row(
    'post_attention_layernorm.weight', ('attention_post_norm/scale',), inputs=0
  ),
  Row('pre_mlp_layernorm.weight', ('mlp_norm/scale',), inputs=0),
  Row('post_mlp_layernorm.weight', ('mlp_post_norm/scale',), inputs=0),
)
# Names of SwiGLU's matrices, theirs and ours.
_SWIGLU = (('gate_proj', 'gate_proj'), ('up_proj', 'up'), ('down_proj', 'down'))
_MLP = _layer(
  *(
    Row(f'mlp.{theirs}.weight', (f'mlp/{ours}/kernel',))
    for theirs, ours in _SWIGLU
  )
)
_EXPERTS = _layer(
  *(
    Row(f'mlp.experts.{{expert}}.{theirs}.weight', (f'moe/{ours}',))
    for theirs, ours in _SWIGLU
  )
)

QWEN3 = (*_COMMON, *_PLAIN_QUERY, *_PRE_NORM, *_MLP)
QWEN3_MOE = (
  *_COMMON,
  *_PLAIN_QUERY,
  *_PRE_NORM,
  *_layer(Row('mlp.gate.weight', ('moe/router/kernel',))),
  *_EXPERTS,
)
GATED_QWEN3 = (
  *_COMMON,
  *_layer(_FUSED_QUERY._replace(groups='kv_heads')),
  *_PRE_NORM,
  *_MLP,
)
QWEN3_NEXT = (
  *_COMMON,
  *_layer(_FUSED_QUERY._replace(groups='heads')),
  *_PRE_NORM,
  *_MLP,
)
AFMOE = (
  *_COMMON,
  *_PLAIN_QUERY,
  *_SEPARATE_GATE,
  *_SANDWICH_NORM,
  *_MLP,
  *_layer(
    Row('mlp.router.gate.weight', ('moe/router/kernel',)),
    Row('mlp.expert_bias', ('moe/router/bias',), inputs=0),
    Row(
      'mlp.shared_experts.gate_proj.weight', ('moe/shared/gate_proj/kernel',)
    ),
    Row('mlp.shared_experts.up_proj.weight', ('moe/shared/up/kernel',)),
    Row('mlp.shared_experts.down_proj.weight', ('moe/shared/down/kernel',)),
  ),
  *_EXPERTS,
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and where it lies in the parameters of ours.

  Attributes:
    name: In their files.
    shape: There.
    leaves: Full paths of ours.
    at: Into the first axes of each leaf (layer, expert); () for the whole.
    parts: The shape of each leaf at that index.
    inputs, groups: Of the row, groups as a number.
  """

  name: str
  shape: Shape
  leaves: tuple[str, ...]
  at: tuple[int, ...]
  parts: tuple[Shape, ...]
  inputs: int
  groups: int

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Theirs to ours: views of it, one for each leaf."""
    if not self.inputs:
      return [tensor]
    columns, groups = self.shape[1], self.groups
    rows = tensor.T.reshape(columns, groups, -1)
    widths = [math.prod(p) // columns // groups for p in self.parts]
    blocks = np.split(rows, np.cumsum(widths)[:-1], axis=2)
    return [b.reshape(p) for b, p in zip(blocks, self.parts, strict=True)]

  def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Ours to theirs: the inverse of `split`."""
    if not self.inputs:
      return parts[0]
    blocks = [p.reshape(self.shape[1], self.groups, -1) for p in parts]
    joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=2)
    return np.ascontiguousarray(joined.reshape(self.shape[::-1]).T)


def _tensor(
  row: Row, config: ModelConfig, shapes: Mapping[str, Shape], numbers: Shape
) -> Tensor | None:
  """The row's tensor for a layer and an expert; None where ours has none."""
  prefix = ''
  index: tuple[int, ...] = ()
  if numbers:
    path, stacked = tree.address(config, numbers[0])
    prefix = '/'.join((*path, ''))
    index = numbers[1:] if stacked is None else (stacked, *numbers[1:])
  leaves = tuple(prefix + path for path in row.ours if prefix + path in shapes)
  if not leaves or leaves[0] != prefix + row.ours[0]:
    return None
  parts = tuple(shapes[leaf][len(index) :] for leaf in leaves)
  shape = parts[0]
  if row.inputs:
    rows = sum(math.prod(p[row.inputs :]) for p in parts)
    shape = (rows, math.prod(parts[0][: row.inputs]))
  return Tensor(
    name=row.theirs.format(
      **dict(zip(('layer', 'expert'), numbers, strict=False))
    ),
    shape=shape,
    leaves=leaves,
    at=index,
    parts=parts,
    inputs=row.inputs,
    groups=getattr(config, row.groups) if row.groups else 1,
  )


def tensors(
  rows: Sequence[Row], config: ModelConfig, shapes: Mapping[str, Shape]
) -> list[Tensor]:
  """Every tensor that a model's parameters make, layer by layer.

  Args:
    rows: Of the family.
    config: Of the model.
    shapes: Of the parameters, by path with slashes.

  Raises:
    ValueError: a parameter or a tensor is covered by no row, or by two.
  """
  found: list[Tensor | None] = []
  tops = [row for row in rows if '{layer}' not in row.theirs]
  found += [_tensor(row, config, shapes, ()) for row in tops]
  for layer in range(config.depth):
    for row in rows:
      if '{expert}' in row.theirs:
        found += [
          _tensor(row, config, shapes, (layer, expert))
          for expert in range(config.moe.experts)
        ]
      elif '{layer}' in row.theirs:
        found.append(_tensor(row, config, shapes, (layer,)))
  result = [tensor for tensor in found if tensor is not None]
  _check(result, shapes)
  return result


def _check(result: Sequence[Tensor], shapes: Mapping[str, Shape]) -> None:
  """Every number of ours in one place of theirs, and no name twice."""
  names: set[str] = set()
  places: set[tuple[str, tuple[int, ...]]] = set()
  held = dict.fromkeys(shapes, 0)
  for tensor in result:
    if tensor.name in names:
      raise ValueError(f'two rows of the table name the tensor {tensor.name}')
    names.add(tensor.name)
    for leaf, part in zip(tensor.leaves, tensor.parts, strict=True):
      if (leaf, tensor.at) in places:
        raise ValueError(
          f'two rows of the table hold the parameter {leaf}, the second as '
          f'{tensor.name}'
        )
      places.add((leaf, tensor.at))
      held[leaf] += math.prod(part)
  for leaf, count in held.items():
    if count != math.prod(shapes[leaf]):
      raise ValueError(
        f'the parameter {leaf} of shape {shapes[leaf]} has no name in this '
        f'family: {count} of its {math.prod(shapes[leaf])} numbers do'
      )
