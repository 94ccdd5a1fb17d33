"""Tries meshes, recomputation and batches on a pod, and ranks what fits.

A step takes minutes to compile, so that not all can be tried. All choices are
ordered by a guess of their speed that needs no compiler (`guess.py`).
Left out, and named, are those

- that must hold more than a device has;
- that need no less memory than one of the same mesh that did not fit;
- that save no more, and take no more rows at once, than one of the same mesh
  that fits; where that saves as much as `minimal`, fewer rows that save more
  are left out as well;
- whose guess is far behind the guess for the quickest that was compiled.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from gated_jax.aot import kernels
from gated_jax.aot.guess import Guess
from gated_jax.aot.guess import Guesser
from gated_jax.aot.report import DoesNotFit
from gated_jax.aot.report import Report
from gated_jax.aot.report import examine
from gated_jax.aot.topology import chip_of
from gated_jax.chips import GIB
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig

TENSOR = (1, 2, 4, 8)
EXPERT = (4, 8, 2, 16, 1)  # likeliest first
LARGEST = 32  # sequences per device
# Guesses are off by much the same factor for all choices of a pod. One that is
# below this share of the quickest choice's guess is not compiled.
MARGIN = 0.85
# Each policy, with those that save all that it saves, and itself.
SAVING_MORE = {
  'minimal': ('minimal', 'none'),
  'none': ('none',),
  'exchange': ('exchange', 'minimal', 'none'),
  'attention': ('attention', 'minimal', 'none'),
  'full': ('full', 'exchange', 'attention', 'minimal', 'none'),
}


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
  def at_once(self) -> float:
    """Rows of the batch that are worked through together."""
    return self.batch / self.accumulate

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


def choices(
  base: RunConfig, devices: int, same_batch: bool = False
) -> Iterator[Choice]:
  """All that can be tried: policies and batches of every mesh."""
  for mesh in meshes(base, devices):
    rows = devices // (mesh.context * mesh.tensor)
    if same_batch:
      batches = [
        (base.data.batch, parts)
        for parts in _doubled(max(1, base.data.batch // rows))
      ]
    else:
      batches = [(n * rows, 1) for n in _doubled(LARGEST)]
    for remat in SAVING_MORE:
      if remat == 'exchange' and mesh.expert == 1:
        continue
      for batch, parts in batches:
        yield Choice(mesh, remat, batch, parts)


def _doubled(most: int) -> Iterator[int]:
  """1, 2, 4 and so on."""
  number = 1
  while number <= most:
    yield number
    number *= 2


def search(
  base: RunConfig,
  devices: list[Any],
  seconds: float,
  say: Callable[[str], None],
  same_batch: bool = False,
) -> list[tuple[Choice, Report]]:
  """Compiles choices, those that are guessed to be quickest first.

  Args:
    base: everything that is not tried.
    devices: of the pod.
    seconds: after which nothing new is started.
    say: told of every attempt, and of what is left out.
    same_batch: every choice has the batch of `base`, if need be in parts.

  Returns:
    What fits, most tokens per second first.
  """
  start = time.monotonic()
  chip = chip_of(devices)
  reports: list[tuple[Choice, Report]] = []
  failed: list[Choice] = []

  @functools.cache
  def price(tensor: int) -> kernels.Price:
    """Kernels' prices, scheduled once for each split of the heads."""
    return kernels.prices(chip.name, base, tensor)

  guesses = _guesses(base, devices, same_batch, say)
  possible = [c for c, guess in guesses.items() if guess.memory <= chip.memory]
  too_large = [c for c, guess in guesses.items() if guess.memory > chip.memory]
  for line in _by_mesh(too_large, guesses):
    say(f'not compiled, as it must hold more than {chip.name} has: {line}')
  for number, choice in enumerate(possible):
    if _far_behind(choice, reports, guesses):
      for line in _by_mesh(possible[number:], guesses):
        say(f'not compiled, as its guess is far behind: {line}')
      break
    if any(_as_large(choice, other) for other in failed):
      say(f'{choice.flags}: not compiled, as what needs less did not fit')
      continue
    if any(_no_gain(choice, other) for other, _ in reports):
      say(f'{choice.flags}: not compiled, as what saves more fits')
      continue
    if time.monotonic() - start > seconds:
      say(f'stopped after {seconds:.0f} s: not everything was tried')
      break
    try:
      report = _examine(choice.config(base), devices, price)
    except DoesNotFit as error:
      say(f'{choice.flags}: {error}')
      failed.append(choice)
    except (ValueError, NotImplementedError) as error:
      say(f'{choice.flags}: {error}')
    else:
      say(f'{choice.flags}: {report.tokens_per_second:,.0f} tokens/s')
      reports.append((choice, report))
  return sorted(reports, key=lambda pair: -pair[1].tokens_per_second)


def _examine(
  config: RunConfig,
  devices: list[Any],
  price: Callable[[int], kernels.Price],
) -> Report:
  """What the compiler says of a config that fits; DoesNotFit where not."""
  report = examine(config, devices, price(config.mesh.tensor))
  if report.excess > 0:
    raise DoesNotFit(f'too large by {report.excess:,.0f} bytes')
  return report


def _far_behind(
  choice: Choice,
  reports: list[tuple[Choice, Report]],
  guesses: dict[Choice, Guess],
) -> bool:
  """Whether a choice's guess promises less than the quickest so far gives."""
  if not reports:
    return False
  best = max(reports, key=lambda pair: pair[1].tokens_per_second)[0]
  least = MARGIN * guesses[best].tokens_per_second
  return guesses[choice].tokens_per_second < least


def _guesses(
  base: RunConfig,
  devices: list[Any],
  same_batch: bool,
  say: Callable[[str], None],
) -> dict[Choice, Guess]:
  """Every choice that suits the pod, quickest guess first."""
  guesser = Guesser.of(base, devices)
  guesses: dict[Choice, Guess] = {}
  for choice in choices(base, len(devices), same_batch):
    try:
      guesses[choice] = guesser(choice.config(base))
    except (ValueError, NotImplementedError) as error:
      say(f'{choice.flags}: {error}')
  order = sorted(guesses, key=lambda c: -guesses[c].tokens_per_second)
  return {choice: guesses[choice] for choice in order}


def _as_large(choice: Choice, other: Choice) -> bool:
  """Whether a choice needs no less memory than the other, on the same mesh."""
  return (
    choice.mesh == other.mesh
    and choice.remat in SAVING_MORE[other.remat]
    and choice.at_once >= other.at_once
  )


def _no_gain(choice: Choice, other: Choice) -> bool:
  """Whether nothing speaks for a choice, as the other fits the same mesh."""
  if choice.mesh != other.mesh or choice.at_once > other.at_once:
    return False
  if other.remat in SAVING_MORE[choice.remat]:
    return True
  enough = other.remat in SAVING_MORE['minimal']
  return enough and choice.at_once < other.at_once


def _by_mesh(
  left_out: list[Choice], guesses: dict[Choice, Guess]
) -> Iterator[str]:
  """What is left out, a line for each mesh, with the guesses."""
  lines: dict[MeshConfig, list[str]] = {}
  for choice in left_out:
    guess = guesses[choice]
    lines.setdefault(choice.mesh, []).append(
      f'{choice.remat} {choice.batch}/{choice.accumulate} '
      f'({guess.tokens_per_second:,.0f} tokens/s, '
      f'{guess.memory / GIB:.1f} GiB)'
    )
  for mesh, each in lines.items():
    axes = ' x '.join(f'{name} {n}' for name, n in mesh.axes.items() if n > 1)
    yield f'{axes}: {", ".join(each)}'


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
