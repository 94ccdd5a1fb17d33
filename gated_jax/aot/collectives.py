"""The collective operations of a compiled program, with bytes and devices."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from gated_jax.aot import hlo
from gated_jax.aot.hlo import Instruction

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, and how often it runs."""

  kind: str
  groups: tuple[tuple[int, ...], ...]  # partitions that talk to each other
  payload: int  # bytes of the array over the whole group
  wire: float  # bytes each device sends, were the group a ring
  asynchronous: bool
  times: int
  op_name: str
  shape: str
  # The instruction that starts it, where the compiled text has another that
  # waits for its end; '': it has none.
  start: str = ''

  @property
  def size(self) -> int:
    """Devices in a group."""
    return len(self.groups[0])


def collectives_of(
  module: hlo.Module, computation: str, times: int
) -> Iterator[Collective]:
  """The collectives of a computation that runs so often.

  One that is spread over several fusions is one.
  """
  seen = set()
  for i in module.computations[computation].values():
    kind = i.op.removesuffix('-start')
    if kind in COLLECTIVES:
      spread = i.op != kind
      found = _collective(module, (computation, i), spread, times)
      yield dataclasses.replace(found, start=i.name if spread else '')
    elif i.op == 'call-start':
      for inner_computation, inner in _fused(module, i.attribute('to_apply')):
        where = inner_computation, inner
        found = _collective(module, where, True, times)
        yield dataclasses.replace(found, start=i.name)
    elif i.op in ('fusion', 'async-start') and i.calls:
      for inner_computation, inner in _fused(module, i.calls):
        # The start, the steps and the end of one collective each hold it.
        key = (inner.op, inner.channel, hlo.without_layout(inner.type))
        if key not in seen:
          seen.add(key)
          spread = i.op == 'async-start' or 'async' in i.name + i.calls
          yield _collective(module, (inner_computation, inner), spread, times)


def _fused(
  module: hlo.Module, computation: str
) -> Iterator[tuple[str, Instruction]]:
  """Collectives in fusions, with the computations that have them."""
  for i in module.computations[computation].values():
    if i.op.removesuffix('-start') in COLLECTIVES:
      yield computation, i
    elif i.op in ('fusion', 'async-start') and i.calls:
      yield from _fused(module, i.calls)
    elif i.op == 'call-start':
      yield from _fused(module, i.attribute('to_apply'))


def _collective(
  module: hlo.Module,
  where: tuple[str, Instruction],
  asynchronous: bool,
  times: int,
) -> Collective:
  """One instruction of a computation, with its bytes."""
  computation, i = where
  kind = i.op.removesuffix('-start')
  groups = device_groups(i, module.partitions)
  n = len(groups[0])
  payload = module.operand_bytes(computation, i)
  share = (n - 1) / n
  if kind == 'all-gather':
    payload *= n
    wire = payload * share
  elif kind == 'all-reduce' and 'all-reduce-scatter' in computation:
    # XLA fused an all-reduce with the slice of it that a device needs.
    kind, wire = 'reduce-scatter', payload * share
  elif kind == 'all-reduce':
    wire = 2 * payload * share
  elif kind == 'collective-permute':
    wire = float(payload)
  else:
    wire = payload * share
  return Collective(
    kind,
    groups,
    payload,
    wire,
    asynchronous,
    times,
    i.op_name,
    hlo.without_layout(i.type),
  )


def device_groups(
  i: Instruction, partitions: int
) -> tuple[tuple[int, ...], ...]:
  """Which partitions take part in a collective together."""
  text = i.attributes
  if i.op.startswith('collective-permute'):
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', text)
    edges = re.findall(r'\{(\d+),(\d+)', pairs.group(1) + '}' if pairs else '')
    return tuple((int(a), int(b)) for a, b in edges if a != b) or ((0,),)
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if mesh:
    sizes = {
      k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))
    }
    over = re.findall(r"'([^']+)'", mesh.group(2))
    rest = [name for name in sizes if name not in over]
    ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    names = list(sizes)
    ids = ids.transpose([names.index(name) for name in (*rest, *over)])
    return _rows(ids, math.prod(sizes[name] for name in over))
  iota = re.search(
    r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  )
  if iota:
    shape = [int(n) for n in iota.group(3).split(',')]
    ids = np.arange(math.prod(shape)).reshape(shape)
    if iota.group(4):
      ids = ids.transpose([int(n) for n in iota.group(4).split(',')])
    return _rows(ids, int(iota.group(2)))
  listed = re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', text)
  if listed:
    return tuple(
      tuple(int(n) for n in group.split(','))
      for group in re.findall(r'\{([\d,]+)\}', listed.group(1))
    )
  return (tuple(range(partitions)),)


def mesh_axes(
  groups: tuple[tuple[int, ...], ...], sizes: dict[str, int]
) -> tuple[str, ...]:
  """The mesh axes that a collective's groups run along.

  Args:
    groups: from a `Collective`.
    sizes: the mesh's axes, outermost first.
  """
  shape = tuple(sizes.values())
  moving = set()
  for group in groups:
    places = np.stack(np.unravel_index(np.array(group), shape))
    moving |= set(np.flatnonzero((places != places[:, :1]).any(1)).tolist())
  return tuple(name for k, name in enumerate(sizes) if k in moving)


def _rows(ids: np.ndarray, width: int) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(row) for row in ids.reshape(-1, width).tolist())
