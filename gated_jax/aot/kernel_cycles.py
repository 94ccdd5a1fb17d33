"""Cycles of the kernels that a function calls, by their schedules."""

import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax

from gated_jax import chips
from gated_jax.aot import counts
from gated_jax.aot import schedule
from gated_jax.aot.attention_kernels import compiling_for
from gated_jax.aot.attention_kernels import device_of


def of_each(
  kind: str,
  run: Callable[..., Any],
  arguments: Sequence[Any],
  folder: pathlib.Path,
) -> dict[str, float]:
  """Cycles of a call of each kernel, by its name; cores share them.

  Args:
    kind: name of a TPU.
    run: calls kernels of different names.
    arguments: abstract arrays on a device of this kind.
    folder: where libtpu writes schedules.
  """
  chip = chips.TPUS[kind]
  # Those of a whole step: many heads need the memory that it lets kernels have.
  options: dict[str, Any] = dict(chip.compiler_options)
  before = set(folder.iterdir())
  with compiling_for(device_of(kind)):
    jax.jit(run).lower(*arguments).compile(options)
  cycles = {}
  for kernel in counts.kernels(run, *arguments):
    (path,) = (p for p in schedule.find(folder, kernel.name) if p not in before)
    stretches = schedule.read(path, chip.core)
    if kernel.body.inside:
      total = schedule.estimate(stretches, kernel, chip.core).cycles
    else:  # no branches: it runs once for each step of the grid
      total = sum(s.cycles for s in stretches) * kernel.body.runs
    cycles[kernel.name] = total / chip.cores
  return cycles
