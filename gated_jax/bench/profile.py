"""The time of a train step, kernel by kernel, from JAX's profiler.

Kernels are grouped by what they are for, by their names and the operation
that the compiler says they came from; what fits no group is listed as it is.
"""

import collections
import pathlib
import re
import tempfile
from typing import Any

import jax

from gated_jax import sharding
from gated_jax.bench.step import Compiled
from gated_jax.bench.step import Workload

# The first that matches the kernel's name counts.
GROUPS = {
  'attention': r'fmha|flash|sdpa|cudnn_generated|mha',
  'products': r'gemm|nvjet|cutlass|xmma|cublas|matmul|splitK|dot',
  'copies': r'memcpy|copy|transpose|concatenate|dynamic_(update_)?slice',
  'memset': r'memset',
  'reductions': r'reduce|reduction',
}


def group_of(kernel: str) -> str:
  """The kernel's group, or 'elementwise'."""
  for group, pattern in GROUPS.items():
    if re.search(pattern, kernel, re.IGNORECASE):
      return group
  return 'elementwise'


def kernels(work: Workload, steps: int = 3) -> list[dict[str, Any]]:
  """Milliseconds a step of every kernel, the largest first."""
  compiled = Compiled(work)
  with sharding.activate(compiled.mesh), tempfile.TemporaryDirectory() as where:
    state = compiled.init(compiled.key)
    state, _ = compiled.step(state, compiled.batch)
    jax.block_until_ready(state)
    with jax.profiler.trace(where):
      for _ in range(steps):
        state, _ = compiled.step(state, compiled.batch)
      jax.block_until_ready(state)
    del state
    (path,) = pathlib.Path(where).rglob('*.xplane.pb')
    return read(path, steps)


def read(path: pathlib.Path, steps: int) -> list[dict[str, Any]]:
  """The kernels of a trace, summed by name and operation."""
  spent: dict[tuple[str, str], float] = collections.defaultdict(float)
  number: dict[tuple[str, str], int] = collections.defaultdict(int)
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    if not plane.name.startswith('/device:'):
      continue
    for line in plane.lines:
      if not line.name.startswith('Stream'):
        continue
      for event in line.events:
        stats = {k: v for k, v in event.stats if k is not None}
        operation = str(stats.get('hlo_op', ''))
        key = event.name, re.sub(r'[.\d]+$', '', operation)
        spent[key] += event.duration_ns / 1e6 / steps
        number[key] += 1
  return [
    {
      'bench': 'profile',
      'group': group_of(f'{kernel} {operation}'),
      'kernel': kernel[:80],
      'operation': operation,
      'ms': ms,
      'launches': number[kernel, operation] / steps,
    }
    for (kernel, operation), ms in sorted(spent.items(), key=lambda x: -x[1])
  ]


def groups(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Milliseconds a step of each group."""
  total: dict[str, float] = collections.defaultdict(float)
  for record in records:
    total[record['group']] += record['ms']
  whole = sum(total.values())
  return [
    {'bench': 'profile', 'group': name, 'ms': ms, 'share': ms / whole}
    for name, ms in sorted(total.items(), key=lambda x: -x[1])
  ]
