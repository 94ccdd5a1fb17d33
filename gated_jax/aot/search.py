"""Tries meshes, recomputation and batches on a pod, and ranks what fits."""

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

REMAT = ('none', 'minimal', 'attention', 'full')
TENSOR = (1, 2, 4, 8)
EXPERT = (1, 4, 8, 16)
LARGEST = 32  # sequences per device


@dataclasses.dataclass(frozen=True)
class Choice:
  """One row of the table before it is tried."""

  mesh: MeshConfig
  remat: str

  def config(self, base: RunConfig, batch: int) -> RunConfig:
    """The base config with this mesh, recomputation and batch."""
    return dataclasses.replace(
      base,
      mesh=self.mesh,
      model=dataclasses.replace(base.model, remat=self.remat),
      data=dataclasses.replace(base.data, batch=batch),
    )

  def flags(self, batch: int) -> str:
    """Flags to add to the command line."""
    return ' '.join(
      [f'--config.mesh.{name}={n}' for name, n in self.mesh.axes.items()]
      + [f'--config.model.remat={self.remat}', f'--config.data.batch={batch}']
    )


def choices(base: RunConfig, devices: int) -> Iterator[Choice]:
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
      mesh = dataclasses.replace(
        base.mesh,
        data=base.mesh.slices,
        fsdp=devices // others // base.mesh.slices,
        expert=expert,
        tensor=tensor,
        slice_axis='data',
      )
      for remat in REMAT:
        yield Choice(mesh, remat)


def search(
  base: RunConfig,
  devices: list[Any],
  seconds: float,
  say: Callable[[str], None],
) -> list[tuple[Choice, Report]]:
  """Doubles the batch of every choice until it is too large.

  Args:
    base: everything that is not tried.
    devices: of the pod.
    seconds: after which nothing new is started.
    say: told of every attempt.

  Returns:
    What fits, most tokens per second first.
  """
  start = time.monotonic()
  chip = chip_of(devices).name

  @functools.cache
  def price(tensor: int) -> kernels.Price:
    """Kernels' prices, scheduled once for each split of the heads."""
    return kernels.prices(chip, base, tensor)

  reports: list[tuple[Choice, Report]] = []
  for choice in choices(base, len(devices)):
    rows = len(devices) // (choice.mesh.context * choice.mesh.tensor)
    batch = rows
    while batch <= LARGEST * rows:
      if time.monotonic() - start > seconds:
        say(f'stopped after {seconds:.0f} s: not everything was tried')
        return _ranked(reports)
      try:
        cost = price(choice.mesh.tensor)
        report = examine(choice.config(base, batch), devices, cost)
      except (DoesNotFit, ValueError, NotImplementedError) as error:
        say(f'{choice.flags(batch)}: {error}')
        break
      if report.excess > 0:
        say(f'{choice.flags(batch)}: too large by {report.excess:,.0f} bytes')
        break
      say(f'{choice.flags(batch)}: {report.tokens_per_second:,.0f} tokens/s')
      reports.append((choice, report))
      batch *= 2
  return _ranked(reports)


def _ranked(found: list[tuple[Choice, Report]]) -> list[tuple[Choice, Report]]:
  return sorted(found, key=lambda pair: -pair[1].tokens_per_second)


def table(found: list[tuple[Choice, Report]]) -> str:
  """Ranked, one line each, with the flags that give it."""
  if not found:
    return 'nothing that was tried fits'
  lines = [f'{"tokens/s":>12}  {"MFU":>6}  {"GiB":>6}  flags']
  for choice, report in found:
    peak = report.compiled.memory.peak / 2**30
    batch = report.compiled.config.data.batch
    lines.append(
      f'{report.tokens_per_second:12,.0f}  {100 * report.utilisation:5.1f}%  '
      f'{peak:6.2f}  {choice.flags(batch)}'
    )
  return '\n'.join(lines)
