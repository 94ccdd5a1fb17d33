"""The first and the last words of a run."""

import dataclasses
import json
import math
import shlex
from typing import Any

import jax

from gated_jax import paths
from gated_jax.evals import page
from gated_jax.evals.likelihood import Likelihood
from gated_jax.model.abstract import boxed_parameters
from gated_jax.paths import Path
from gated_jax.training import commands
from gated_jax.training.build import RunState
from gated_jax.training.parts import trained_part

NAMED = 10  # skipped files


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The figures that a run ended with."""

  step: int
  validation: Likelihood
  report: Any  # made by evals.diagnostics; None: nothing was held out
  tokens_per_second: float
  stopped_by: str = ''  # name of the signal that ended it before its last step


def opening(run: RunState) -> str:
  """One line on the model, the data and the devices of a run."""
  params = run.state.params
  count = f'{sum(x.size for x in jax.tree.leaves(params)):,} parameters'
  kind = jax.devices()[0].device_kind
  config, data = run.config, run.config.data
  if config.optimizer.train != 'all':
    part = trained_part(config.optimizer.train, boxed_parameters(config.model))
    count += f', of which {part.size(params):,} train'
  return (
    f'{count}; {data.batch} x {data.length} tokens a step from '
    f'{run.data.name}; {config.steps} steps on {jax.device_count()} x {kind}; '
    f'in {run.workdir}'
  )


def _rows(run: RunState, result: RunResult) -> list[tuple[str, str]]:
  """Names and values of the closing table, without what was not measured."""
  numbers: list[tuple[str, float, str]] = [
    ('validation loss', result.validation.loss, '{:.4f} nats per token'),
    ('bits per byte', result.validation.bits_per_byte, '{:.4f}'),
  ]
  if result.report is not None:
    numbers += result.report.summary()
  numbers.append(('tokens/s', result.tokens_per_second or math.nan, '{:,.0f}'))
  clock = run.clock
  lost = ', '.join(
    f'{name} {clock.total.get(name, 0.0) / clock.seconds:.1%}'
    for name in ('data', 'compile', 'checkpoint', 'evaluation')
  )
  rows = [
    (name, form.format(value) if math.isfinite(value) else 'n/a')
    for name, value, form in numbers
  ]
  rows.append(('time spent on', lost))
  skipped = int(run.state.skipped)
  if skipped:
    rows.append(('skipped updates', str(skipped)))
  return rows


def _figures(run: RunState, report: Any) -> tuple[str, list[Path]]:
  """Draws them: what is said of them, or why there are none, and the files."""
  if not run.config.figures:
    return 'off (figures=False)', []
  if report is None:
    return 'none: nothing was held out to look at', []
  if jax.process_index():
    return '', []
  folder = run.workdir / 'figures'
  try:
    from gated_jax.evals import plot

    drawn = plot.figures(run.metrics.path, report, folder)
  except ImportError:
    return "none: matplotlib is missing, pip install 'gated_jax[plot]'", []
  except OSError as error:  # the rest of the report is no less true
    return f'none: {error}', []
  return f'{folder} ({", ".join(path.name for path in drawn)})', drawn


def _page(
  run: RunState, rows: list[tuple[str, str]], figures: list[Path]
) -> str:
  """Writes all of it as one page beside the figures; where, or why not."""
  path = run.workdir / 'figures/report.html'
  try:
    page.write(
      path, paths.absolute(run.workdir).name, rows, figures, run.config
    )
  except OSError as error:
    return f'none: {error}'
  return str(path)


def _keep_probe(run: RunState, report: Any) -> None:
  """Writes the last look inside, by layer and head, for later comparisons."""
  if report is None or jax.process_index():
    return
  path = run.workdir / 'probe.json'
  paths.write_bytes(path, json.dumps(report.arrays()).encode() + b'\n')


def _skipped(files: dict[str, str]) -> str:
  """How many, and which; of very many only the first."""
  shown = [f'{name} ({reason})' for name, reason in files.items()][:NAMED]
  more = f' and {len(files) - NAMED} more' if len(files) > NAMED else ''
  return f'{len(files)}: {", ".join(shown)}{more}'


def _sample(run: RunState, checkpoint: Path, command: str) -> str:
  """The command that samples from a checkpoint, with text like the data's."""
  prompt = run.evaluation.prompt
  if not prompt and not run.data.is_text:
    return 'n/a: nothing says which text the ids of the data stand for'
  python = shlex.split(command)[0] if command else 'python'
  talks = any(part.is_chat for _, part in run.config.data.parts())
  return shlex.join(
    [
      python,
      '-m',
      'gated_jax.decode',
      f'--checkpoint={checkpoint}',
      '--chat' if talks else f'--prompt={prompt or "The "}',
    ]
  )


def closing(run: RunState, result: RunResult, command: str) -> None:
  """Prints what came out, where it lies and what to type next."""
  _keep_probe(run, result.report)
  checkpoint = run.checkpoints.path(result.step)
  figures, drawn = _figures(run, result.report)
  rows = [
    *_rows(run, result),
    ('checkpoint', str(checkpoint)),
    ('metrics', str(run.metrics.path)),
    ('figures', figures),
    ('sample from it', _sample(run, checkpoint, command)),
    ('resume it', commands.longer(command, 2 * run.config.steps)),
  ]
  if run.data.skipped:
    rows.append(('skipped files', _skipped(run.data.skipped)))
  if run.data.shortened:
    rows.append(
      ('shortened', f'{run.data.shortened:,} conversations, to fit into a row')
    )
  if drawn:
    place = rows.index(('figures', figures)) + 1
    rows.insert(place, ('all on one page', _page(run, rows, drawn)))
  width = max(len(name) for name, _ in rows)
  run.console.say('')
  for name, value in rows:
    run.console.say(f'{name:<{width}}  {value}')
