"""Which tensor of theirs holds which parameters of ours: tables of names.

A row serves both directions. What it says about a tensor is data, so that
reading, writing and the expected shape are three views of the same row:

    inputs=1   a weight [rows, columns] is our kernel [columns, ...] transposed
    inputs=2   the same, our first two axes being the columns ([N, H, D])
    inputs=0   stored as it is
    vector     a bias [rows], which is our [N, H] or [F] in one piece
    stack      that many first axes count matrices (experts), in both
    filter     a weight [rows, 1, columns] of a convolution over each channel,
               which is our filter [columns, ...] transposed
    groups     a weight or a bias that holds several of ours has its rows in
               that many groups, each of them [first | second]

So the layouts in which others keep the gate within `q_proj` differ by one
word: the authors' models group rows by kv head, Qwen3-Next by query head.
Read `gated_jax/hf/families/rows.py` next.
"""

import dataclasses
import math
import operator
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
    inputs, stack, vector, filter, groups: As above; groups is the name of a
      setting of the model, dotted where it stands in a group.
  """

  theirs: str
  ours: tuple[str, ...]
  inputs: int = 1
  groups: str = ''
  stack: int = 0
  vector: bool = False
  filter: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and where it lies in the parameters of ours.

  Attributes:
    name: In their files.
    shape: There.
    leaves: Full paths of ours.
    at: Into the first axes of each leaf (layer, expert); () for the whole.
    parts: The shape of each leaf at that index.
    row: What its kind is.
    groups: Of the row, as a number.
  """

  name: str
  shape: Shape
  leaves: tuple[str, ...]
  at: tuple[int, ...]
  parts: tuple[Shape, ...]
  row: Row
  groups: int

  def _grouped(self) -> Shape:
    """Ours, joined: any stack, columns, groups, and the rows of a group."""
    stack = self.shape[: self.row.stack]
    columns = 1 if self.row.vector else self.shape[-1]
    return (*stack, columns, self.groups, -1)

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Theirs to ours: views of it, one for each leaf."""
    if not (self.row.inputs or self.row.vector):
      return [tensor]
    if self.row.filter:
      tensor = tensor.squeeze(-2)
    if not self.row.vector:
      tensor = tensor.swapaxes(-1, -2)
    rows = tensor.reshape(self._grouped())
    outer = math.prod(rows.shape[:-1])
    widths = [math.prod(part) // outer for part in self.parts]
    blocks = np.split(rows, np.cumsum(widths)[:-1], axis=-1)
    return [b.reshape(p) for b, p in zip(blocks, self.parts, strict=True)]

  def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Ours to theirs: the inverse of `split`."""
    if not (self.row.inputs or self.row.vector):
      return parts[0]
    blocks = [p.reshape(self._grouped()) for p in parts]
    joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-1)
    if self.row.vector:
      return joined.reshape(self.shape)
    *before, columns = self.shape
    stack, rows = before[: self.row.stack], math.prod(before[self.row.stack :])
    joined = joined.reshape(*stack, columns, rows).swapaxes(-1, -2)
    return np.ascontiguousarray(joined.reshape(self.shape))


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
  return Tensor(
    name=row.theirs.format(
      **dict(zip(('layer', 'expert'), numbers, strict=False))
    ),
    shape=_their_shape(row, parts),
    leaves=leaves,
    at=index,
    parts=parts,
    row=row,
    groups=operator.attrgetter(row.groups)(config) if row.groups else 1,
  )


def _their_shape(row: Row, parts: Sequence[Shape]) -> Shape:
  """The shape of a tensor that holds parameters of these shapes."""
  if row.vector:
    return (sum(math.prod(part) for part in parts),)
  if not row.inputs:
    return parts[0]
  stack = parts[0][: row.stack]
  first = row.stack + row.inputs
  rows = sum(math.prod(part[first:]) for part in parts)
  between = (1,) * row.filter
  return (*stack, rows, *between, math.prod(parts[0][row.stack : first]))


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
  named: list[Tensor | None] = []
  tops = [row for row in rows if '{layer}' not in row.theirs]
  named += [_tensor(row, config, shapes, ()) for row in tops]
  for layer in range(config.depth):
    for row in rows:
      if '{expert}' in row.theirs:
        named += [
          _tensor(row, config, shapes, (layer, expert))
          for expert in range(config.moe.experts)
        ]
      elif '{layer}' in row.theirs:
        named.append(_tensor(row, config, shapes, (layer,)))
  result = [tensor for tensor in named if tensor is not None]
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
