"""Reads how long a Pallas kernel takes out of the TPU compiler's own schedule.

With the flags below libtpu writes each kernel's last program: very long
instruction words (bundles), each at least one cycle. This file cuts such a
program into stretches that run as a whole, loop bodies and predicated regions,
and prices each: bundles, or the cycles that its matrix products keep the
matrix units busy, whichever is more. How often a stretch runs is not in the
text; `bench.py` knows it for the kernels that it compares.

Not counted: waiting for memory, contention, caches. An estimate, not a time.
"""

import dataclasses
import pathlib
import re

FLAGS = (
  '--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=final'
)
_BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*(>*)\s*\{')
_PRODUCT = re.compile(r'vmatmul\.([a-z0-9.]+)')
# A branch takes effect four bundles later.
_DELAY = 4


@dataclasses.dataclass(frozen=True)
class Core:
  """What the schedule does not say about a tensor core."""

  topology: str
  clock: float  # cycles per second
  cores: int  # of one device
  units: int  # matrix units
  # Cycles of a matrix instruction: 16 rows of 16 bits, or 8 of 32.
  narrow: int
  wide: int
  # Cycles of a product of 1024 x 128 and 128 x 128: every unit busy.
  square: float


CORES = {
  'v5e': Core('v5e:2x2', 1.5e9, 1, 4, 16, 8, 256.0),
  'v5p': Core('v5p:2x2x1', 1.75e9, 2, 4, 16, 8, 256.0),
  'v6e': Core('v6e:2x2', 1.75e9, 1, 2, 8, 4, 128.0),
}


@dataclasses.dataclass
class Stretch:
  """Bundles that run together."""

  loop: bool  # the body of a loop inside the grid's
  bundles: int = 0
  products: float = 0.0  # cycles of the matrix units

  @property
  def cycles(self) -> float:
    """At least this many."""
    return max(self.bundles, self.products)


def read(path: pathlib.Path, core: Core) -> list[Stretch]:
  """The stretches of one kernel in the order of its program."""
  stretches = [Stretch(False)]
  left = -1
  for line in path.read_text().splitlines():
    bundle = _BUNDLE.match(line)
    if not bundle:
      continue
    if bundle.group(1) or left == 0:
      inner = bundle.group(1) == 'LB' and len(bundle.group(2)) > 1
      stretches.append(Stretch(inner))
      left = -1
    now = stretches[-1]
    now.bundles += 1
    for kind in _PRODUCT.findall(line):
      cycles = core.narrow if 'bf16' in kind else core.wide
      now.products += cycles / core.units
    left -= left > 0
    if 'sbr.rel' in line:
      left = _DELAY
  return stretches


def find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """The last program of the kernel whose name has this in it."""
  for path in sorted(folder.glob('*-final_bundles.txt')):
    if name in path.name and 'schedule-analysis' not in path.name:
      return path
  return None
