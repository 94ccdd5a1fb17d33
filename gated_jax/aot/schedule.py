"""Reads how long a Pallas kernel takes out of the TPU compiler's own schedule.

With the flags of `dumps.py` libtpu writes each kernel's last program: very long
instruction words (bundles), each at least one cycle. This file cuts such a
program into stretches that run as a whole, loop bodies and predicated regions,
and prices each: bundles, or the cycles that its matrix products keep the
matrix units busy, whichever is more. How often a stretch runs is not in the
text, but in the kernel's jaxpr (`counts.py`): `estimate` puts the two together.

Not counted: waiting for memory, contention, caches. An estimate, not a time.
"""

import dataclasses
import functools
import pathlib
import re

from gated_jax.aot.counts import Kernel
from gated_jax.aot.counts import Part
from gated_jax.chips import TensorCore

_PROGRAM = '-final_bundles.txt'
_USE = 'per-bundle-utilization.txt'
_BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*(>*)\s*\{')
_PRODUCT = re.compile(r'vmatmul\.([a-z0-9.]+)')
# A branch takes effect four bundles later.
_DELAY = 4
# A shorter stretch belongs to the grid's own bookkeeping, once a step.
_SHORT = 100


@dataclasses.dataclass
class Stretch:
  """Bundles that run together."""

  # 'loop': the body of a loop inside the grid's; 'branch': that of a condition;
  # 'rest': bundles between those.
  kind: str
  depth: int = 0  # loops around it; 1: the grid's
  bundles: int = 0
  products: float = 0.0  # cycles that its products take the matrix units
  # Slots used of each unit, over those there are.
  use: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def cycles(self) -> float:
    """A lower bound of its cycles."""
    return max(self.bundles, self.products)


def read(path: pathlib.Path, core: TensorCore) -> list[Stretch]:
  """The stretches of one kernel in the order of its program."""
  stretches = [Stretch('rest')]
  left = -1
  for line in path.read_text().splitlines():
    bundle = _BUNDLE.match(line)
    if not bundle:
      continue
    label, depth = bundle.group(1), len(bundle.group(2))
    if label or left == 0:
      kind = 'rest' if label else 'branch'
      kind = 'loop' if label == 'LB' and depth > 1 else kind
      stretches.append(Stretch(kind))
      left = -1
    now = stretches[-1]
    now.depth = max(now.depth, depth)  # an empty bundle shows none
    now.bundles += 1
    for product in _PRODUCT.findall(line):
      cycles = core.narrow if 'bf16' in product else core.wide
      now.products += cycles / core.matrix_units
    left -= left > 0
    if 'sbr.rel' in line:
      left = _DELAY
  _read_use(path, stretches)
  return stretches


def _read_use(path: pathlib.Path, stretches: list[Stretch]) -> None:
  """Fills in which units are busy, where the compiler wrote it down."""
  stamp, _, rest = path.name.partition('-')
  kernel = rest.removesuffix(_PROGRAM).rpartition('-')[0]
  for other in path.parent.glob(f'{stamp}-*{_USE}'):
    if not other.name.startswith(f'{stamp}-{kernel}-'):
      continue
    lines = other.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(',')]
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:]]
    at = 0
    for s in stretches:
      mine = rows[at : at + s.bundles]
      at += s.bundles
      sums = [sum(column) for column in zip(*mine, strict=True)]
      s.use = {
        name: used / (most * s.bundles)
        for name, used, most in zip(names, sums, capacity, strict=False)
      }


def find(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The last programs of the kernels whose name has this in it, in order."""

  def number(path: pathlib.Path) -> int:
    """The compiler numbers programs in the order in which it made them."""
    digits = re.search(rf'{name}\w*\.(\d+)-', path.name)
    return int(digits.group(1)) if digits else 0

  paths = [
    path
    for path in folder.glob(f'*{name}*{_PROGRAM}')
    if 'schedule-analysis' not in path.name
  ]
  return sorted(paths, key=number)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Cycles of one kernel, and the stretch that has most of them."""

  cycles: float
  most: Stretch
  flops: float  # those of that stretch's products
  # Every stretch, and how often it runs.
  runs: tuple[tuple[Stretch, float], ...]


def estimate(
  stretches: list[Stretch], kernel: Kernel, core: TensorCore
) -> Estimate:
  """Stretches times how often each runs.

  Raises:
    ValueError: the compiled program is not cut as the jaxpr is.
  """
  pairs = _align(stretches, [p for p in kernel.body.walk() if p.work], core)
  steps = kernel.body.runs
  around = {0: 1.0, 1: float(steps)}  # runs of the loop at each depth
  runs: list[tuple[Stretch, float]] = []
  for k, s in enumerate(stretches):
    depth = min(s.depth, max(around))
    times = around[depth]
    if k in pairs:
      times = pairs[k].runs
      if s.kind == 'loop':
        around[s.depth] = times
    runs.append((s, times))
  k = max(pairs, key=lambda k: stretches[k].cycles * pairs[k].runs)
  total = sum(s.cycles * times for s, times in runs)
  return Estimate(total, stretches[k], pairs[k].flops, tuple(runs))


def _align(
  stretches: list[Stretch], parts: list[Part], core: TensorCore
) -> dict[int, Part]:
  """Which part of the jaxpr a stretch is, for those that are one.

  Both are in the order of the program. Parts with matrix products must be
  found, each with as many of them as its FLOPs say. Others may be missing,
  because the compiler made no branch of them: they are then in the stretches
  around, which run at least as often.
  """
  body, rest = parts[0], parts[1:]

  def skip_part(p: Part) -> float:
    """The cost of a part of the kernel that no stretch stands for."""
    if p.flops and p.runs:
      return float('inf')
    return 1.0 if 0 < p.runs < body.runs else 0.3

  def skip_stretch(s: Stretch) -> float:
    """The cost of a stretch of bundles that belongs to no part."""
    if s.products > _SHORT and not body.flops:
      return float('inf')
    return 0.0 if s.kind == 'rest' else 0.5 if s.bundles < _SHORT else 2.0

  def pair(s: Stretch, p: Part) -> float:
    """The cost of taking this stretch for this part; infinite if unlike."""
    wanted = core.product_cycles(p.flops)
    if bool(wanted) != (s.products > _SHORT):
      return float('inf')
    if wanted and not 0.9 < s.products / wanted < 2.2:
      return float('inf')
    if s.kind != ('loop' if p.loop else 'branch'):
      # A branch that is always taken needs no jump around it.
      return 0.5 if wanted and not p.loop else float('inf')
    return 0.0 if p.runs else 0.4

  @functools.cache
  def best(i: int, j: int) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The cheapest pairing of what follows stretch i and part j."""
    choices = []
    if i < len(stretches) and j < len(rest):
      cost, pairs = best(i + 1, j + 1)
      choices.append((cost + pair(stretches[i], rest[j]), ((i, j), *pairs)))
    if i < len(stretches):
      cost, pairs = best(i + 1, j)
      choices.append((cost + skip_stretch(stretches[i]), pairs))
    if j < len(rest):
      cost, pairs = best(i, j + 1)
      choices.append((cost + skip_part(rest[j]), pairs))
    return min(choices, key=lambda c: c[0]) if choices else (0.0, ())

  cost, pairs = best(0, 0)
  if cost == float('inf'):
    raise ValueError(_unlike(stretches, rest, core))
  return {i: rest[j] for i, j in pairs}


def _unlike(
  stretches: list[Stretch], parts: list[Part], core: TensorCore
) -> str:
  """The message where products of schedule and kernel do not go together."""
  scheduled = [round(s.products) for s in stretches if s.products > _SHORT]
  written = [
    round(core.product_cycles(p.flops)) for p in parts if p.flops and p.runs
  ]
  return (
    f'the schedule has stretches with {scheduled} cycles of matrix products, '
    f'the kernel has parts with {written}'
  )
