"""Tries meshes, recomputation and batches on a pod, and ranks what fits.

A step takes minutes to compile, so that not all can be tried. For each mesh
and batch the search begins with remat `minimal`. Where that fits it tries
`none`, and nothing that recomputes more; where it does not, it tries what
recomputes more, until something fits. A batch that does not fit in any way is
the last of its mesh.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from gated_jax.aot import kernels
from gated_jax.aot.report import DoesNotFit
from gated_jax.aot.report import Report
from gated_jax.aot.report import examine
from gated_jax.aot.topology import chip_of
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig

TENSOR = (1, 2, 4, 8)
EXPERT = (4, 8, 2, 16, 1)  # likeliest first
LARGEST = 32  # sequences per device


class _Late(Exception):
  """The time is over."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """One row of the table before it is tried."""

  mesh: MeshConfig
  remat: str
  batch: int
  accumulate: int  # parts of a batch, one after the other

  def config(self, base: RunConfig) -> RunConfig:
    """The base config with this mesh, recomputation and batch."""
    replace = dataclasses.replace
    return replace(
      base,
      mesh=self.mesh,
      model=replace(base.model, remat=self.remat),
      data=replace(base.data, batch=self.batch),
      optimizer=replace(base.optimizer, accumulate=self.accumulate),
    )

  @property
  def flags(self) -> str:
    """Flags to add to the command line."""
    settings: dict[str, int | str] = {
      f'mesh.{name}': n for name, n in self.mesh.axes.items()
    }
    settings |= {
      'model.remat': self.remat,
      'data.batch': self.batch,
      'optimizer.accumulate': self.accumulate,
    }
    return ' '.join(f'--config.{k}={v}' for k, v in settings.items())


def meshes(base: RunConfig, devices: int) -> Iterator[MeshConfig]:
  """Meshes that divide both the pod and the model, likeliest first."""
  model = base.model
  for tensor in TENSOR:
    for expert in EXPERT if model.has_experts else (1,):
      others = tensor * expert * base.mesh.context
      if (
        devices % others
        or model.heads % tensor
        or any(layer.ffn_width % tensor for layer in model.distinct_layers)
        or (expert > 1 and model.moe.experts % expert)
      ):
        continue
      yield dataclasses.replace(
        base.mesh,
        data=base.mesh.slices,
        fsdp=devices // others // base.mesh.slices,
        expert=expert,
        tensor=tensor,
        slice_axis='data',
      )


def search(
  base: RunConfig,
  devices: list[Any],
  seconds: float,
  say: Callable[[str], None],
  same_batch: bool = False,
) -> list[tuple[Choice, Report]]:
  """Tries every mesh, with the batch doubled until nothing fits.

  Args:
    base: everything that is not tried.
    devices: of the pod.
    seconds: after which nothing new is started.
    say: told of every attempt.
    same_batch: every choice has the batch of `base`, if need be in parts.

  Returns:
    What fits, most tokens per second first.
  """
  start = time.monotonic()
  chip = chip_of(devices).name
  reports: list[tuple[Choice, Report]] = []

  @functools.cache
  def price(tensor: int) -> kernels.Price:
    """Kernels' prices, scheduled once for each split of the heads."""
    return kernels.prices(chip, base, tensor)

  def fits(choice: Choice) -> bool:
    """Compiles it, says what came out and keeps it if it fits."""
    if time.monotonic() - start > seconds:
      raise _Late
    try:
      cost = price(choice.mesh.tensor)
      report = examine(choice.config(base), devices, cost)
    except (DoesNotFit, ValueError, NotImplementedError) as error:
      say(f'{choice.flags}: {error}')
      return False
    if report.excess > 0:
      say(f'{choice.flags}: too large by {report.excess:,.0f} bytes')
      return False
    say(f'{choice.flags}: {report.tokens_per_second:,.0f} tokens/s')
    reports.append((choice, report))
    return True

  try:
    for mesh in meshes(base, len(devices)):
      rows = len(devices) // (mesh.context * mesh.tensor)
      if same_batch:
        _settle(fits, mesh, base.data.batch, rows)
        continue
      batch = rows
      while batch <= LARGEST * rows and _settle(fits, mesh, batch, batch):
        batch *= 2
  except _Late:
    say(f'stopped after {seconds:.0f} s: not everything was tried')
  return sorted(reports, key=lambda pair: -pair[1].tokens_per_second)


def _settle(
  fits: Callable[[Choice], bool], mesh: MeshConfig, batch: int, smallest: int
) -> bool:
  """Tries the policies of one mesh and batch; False: none of them fits.

  Args:
    fits: tries a choice.
    mesh: of the choices.
    batch: of the choices.
    smallest: rows that a batch may be cut into parts of.
  """

  def choice(remat: str, parts: int = 1) -> Choice:
    """With this mesh and batch."""
    return Choice(mesh, remat, batch, parts)

  if fits(choice('minimal')):
    fits(choice('none'))
    return True
  found = False
  parts = 2
  while parts * smallest <= batch and not found:
    found = fits(choice('minimal', parts))
    parts *= 2
  # With experts split over devices neither is known to recompute less.
  middle = ('attention', 'exchange') if mesh.expert > 1 else ('attention',)
  for remat in middle:
    found = fits(choice(remat)) or found
  return found or fits(choice('full'))


def table(reports: list[tuple[Choice, Report]]) -> str:
  """Ranked, one line each, with the flags that give it."""
  if not reports:
    return 'nothing that was tried fits'
  lines = [f'{"tokens/s":>12}  {"MFU":>6}  {"GiB":>6}  flags']
  for choice, report in reports:
    peak = report.compiled.memory.peak / 2**30
    lines.append(
      f'{report.tokens_per_second:12,.0f}  {100 * report.utilisation:5.1f}%  '
      f'{peak:6.2f}  {choice.flags}'
    )
  return '\n'.join(lines)
