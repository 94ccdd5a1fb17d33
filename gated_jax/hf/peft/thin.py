"""One of their matrices and its adapter, from ours and back.

PEFT holds A [r, columns] and B [rows, r] for a weight [rows, columns], or
A [E r, columns] and B [rows, r E] for a tensor of E experts. Where a tensor of
theirs holds several matrices of ours (queries and gates), each of ours has an
adapter of its own. Side by side they are one of a larger rank:

    A = [A_query]    B = [B_query    0   ]    by rows of the joint tensor
        [A_gate ]        [   0     B_gate]

One A for both, as PEFT makes it, is the same A twice.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gated_jax.hf.families import Family
from gated_jax.hf.families.rows import FUSED_EXPERTS
from gated_jax.hf.families.rows import renamed
from gated_jax.hf.names import Row
from gated_jax.hf.names import Tensor

_EXPERTS = {path for row in FUSED_EXPERTS for path in row.ours}
# PEFT takes any module of these names for an expert, in models with experts.
_TAKEN = re.compile(r'\.(gate|up|down)_proj\.weight$')


class Thin(NamedTuple):
  """The two sides of an adapter, of our axes or of theirs."""

  a: np.ndarray
  b: np.ndarray

  @property
  def rank(self) -> int:
    """The rank of the product, where the axes are ours."""
    return int(self.a.shape[-1])

  def padded(self, rank: int, stack: int) -> 'Thin':
    """The same product as one of a larger rank, where the axes are ours.

    Zeros on both sides add nothing, and no gradient moves them.
    """
    more = rank - self.rank
    a = np.pad(self.a, [(0, 0)] * (self.a.ndim - 1) + [(0, more)])
    after = self.b.ndim - stack - 1
    b = np.pad(self.b, [(0, 0)] * stack + [(0, more)] + [(0, 0)] * after)
    return Thin(a, b)


def joined_rows(family: Family) -> tuple[Row, ...]:
  """A family's tensors with the experts of a layer in one, as modules are."""
  own = [row for row in family.rows if not _EXPERTS & set(row.ours)]
  split = [row for row in family.rows if _EXPERTS & set(row.ours)]
  if not split:
    return tuple(own)
  before = split[0].theirs.partition('layers.')[0]
  return (*own, *renamed(FUSED_EXPERTS, 'model.', before))


def target(name: str, family: Family) -> str:
  """The name by which PEFT is told to adapt a tensor.

  A module where it may be one, else a parameter: PEFT moves the adapters of
  modules that are named like an expert's matrix to the experts, and leaves
  those of parameters alone.
  """
  sparse = any(_EXPERTS & set(row.ours) for row in family.rows)
  for old, new in family.modules:
    name = name.replace(old, new)
  if sparse and _TAKEN.search(name):
    return name
  return name.removesuffix('.weight')


def is_parameter(name: str) -> bool:
  """True for a target that is no module."""
  return name.endswith('.weight') or '.experts.' in name


def experts(tensor: Tensor) -> int:
  """How many matrices of theirs a tensor is; 1 for one that is no stack."""
  return tensor.shape[0] if tensor.row.stack else 1


def module(name: str, also: Mapping[str, Tensor]) -> str:
  """The module whose adapter is a tensor's, in PEFT's tree of modules.

  Args:
    name: Of the tensor.
    also: The tensors that have adapters. PEFT wraps a module once for each of
      its parameters, the first one innermost.
  """
  if name.endswith('.weight'):
    return name.removesuffix('.weight')
  owner, _, last = name.rpartition('.')
  wrapped = last == 'gate_up_proj' and f'{owner}.down_proj' in also
  return f'{owner}.base_layer' if wrapped else owner


def _columns(tensor: Tensor, rank: int) -> Tensor:
  """B, which has the rows of a tensor, and as columns those of its rank."""
  first = tensor.row.stack + tensor.row.inputs
  return dataclasses.replace(
    tensor,
    shape=(*tensor.shape[:-1], rank),
    parts=tuple(
      (*part[: tensor.row.stack], rank, *part[first:]) for part in tensor.parts
    ),
    row=tensor.row._replace(inputs=1),
  )


def to_theirs(tensor: Tensor, adapters: Mapping[str, Thin]) -> Thin:
  """The adapter of a tensor.

  Args:
    tensor: Whose matrices have adapters, or some of them have.
    adapters: By the path of the matrix, at the tensor's place.
  """
  own = [path for path in tensor.leaves if path in adapters]
  sides = [_flat_a(tensor, adapters[path].a) for path in own]
  shared = all(np.array_equal(sides[0], side) for side in sides)
  a = sides[0] if shared else np.concatenate(sides, axis=-2)
  laid = _columns(tensor, a.shape[-2])
  parts = []
  begin = 0
  for path, shape in zip(tensor.leaves, laid.parts, strict=True):
    part = np.zeros(shape, a.dtype)
    if path in adapters:
      b = adapters[path].b
      rank = b.shape[tensor.row.stack]
      place = (slice(None),) * tensor.row.stack
      part[(*place, slice(begin, begin + rank))] = b
      begin += 0 if shared else rank
    parts.append(part)
  b = laid.join(parts)
  if tensor.row.stack:
    a = a.reshape(-1, a.shape[-1])
    b = np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
  return Thin(np.ascontiguousarray(a), np.ascontiguousarray(b))


def _flat_a(tensor: Tensor, a: np.ndarray) -> np.ndarray:
  """A [..., inputs, r] as [..., r, columns]."""
  stack, rank = a.shape[: tensor.row.stack], a.shape[-1]
  return a.reshape(*stack, -1, rank).swapaxes(-1, -2)


def shapes(tensor: Tensor, a: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
  """The shapes of both sides, by the rank that A is of."""
  total = a[0] // experts(tensor) * experts(tensor) if a else 0
  rows, columns = tensor.shape[-2:]
  return (total, columns), (rows, total)


def to_ours(tensor: Tensor, thin: Thin, rank: int) -> dict[str, Thin]:
  """The adapter of each matrix that a tensor holds, by path.

  Args:
    tensor: That the adapter is of.
    thin: Of the right shapes.
    rank: Most adapters of this model have. Where a joint tensor has as many
      times as much as matrices, and B is of blocks, each has its own.
  """
  a, b = thin
  if tensor.row.stack:
    count = experts(tensor)
    a = a.reshape(count, -1, a.shape[-1])
    b = np.moveaxis(b.reshape(b.shape[0], -1, count), -1, 0)
  parts = _columns(tensor, a.shape[-2]).split(b)
  axis = tensor.row.stack
  blocks = _blocks([np.moveaxis(part, axis, 0) for part in parts], rank)
  first = axis + tensor.row.inputs
  sides = {}
  for path, part, whole, block in zip(
    tensor.leaves, parts, tensor.parts, blocks, strict=True
  ):
    own = np.moveaxis(part, axis, 0)[block]
    side = a[..., block, :].swapaxes(-1, -2)
    sides[path] = Thin(
      side.reshape(*whole[:first], -1), np.moveaxis(own, 0, axis)
    )
  return sides


def _blocks(parts: list[np.ndarray], rank: int) -> list[slice]:
  """The part of the rank that each of several matrices uses."""
  total = parts[0].shape[0]
  used = [i for i, part in enumerate(parts) if part.any()] or [
    *range(len(parts))
  ]
  whole = [slice(0, total)] * len(parts)
  if len(used) == 1 or total != rank * len(used):
    return whole
  for place, i in enumerate(used):
    own = slice(place * rank, (place + 1) * rank)
    rest = np.delete(parts[i], own, axis=0)
    if rest.any():
      return [slice(0, total)] * len(parts)
    whole[i] = own
  return whole
