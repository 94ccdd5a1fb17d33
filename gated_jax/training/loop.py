"""A run from its settings to its report: build, resume, train, sum up.

    config -> build (mesh, model, optimizer, data) -> restore -> compile
      -> steps, each of them dispatched without waiting for the one before
      -> final evaluation, checkpoint, figures and report

Read `gated_jax/training/step.py` for what one step computes, `build.py` for
how it is put together, `checkpoints.py` for what is kept and `report.py` for
what is said at the end.
"""

import collections
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gated_jax import sharding
from gated_jax.config import RunConfig
from gated_jax.data.batch import arrays_of
from gated_jax.evals.likelihood import Likelihood
from gated_jax.model.accounting import flops_per_token
from gated_jax.training import report
from gated_jax.training.build import Parts
from gated_jax.training.build import build
from gated_jax.training.build import share_of_process
from gated_jax.training.build import to_devices
from gated_jax.training.console import Console
from gated_jax.training.console import StopRequest
from gated_jax.training.console import stop_on_signal
from gated_jax.training.metrics import utilisation

# Steps dispatched ahead of the one whose metrics the host has seen: enough to
# keep the device busy, few enough to notice trouble at once.
IN_FLIGHT = 2


class RunStopped(RuntimeError):
  """The run cannot go on; what was saved is good."""


class Loop:
  """The steps of a run, dispatched ahead of what the host has seen."""

  def __init__(self, parts: Parts):
    self.parts = parts
    self.first = self.done = int(parts.state.step)
    self.validation = Likelihood(0.0, 0.0)
    self._validated = -1  # the step it was measured at
    self.report: Any = None
    self._pending: collections.deque[Any] = collections.deque()
    self._waited = parts.data.wait_seconds
    self._lap_step = self.first
    self._tokens = parts.config.data.batch * parts.config.data.length
    self._flops = sum(
      flops_per_token(parts.config.model, parts.config.data.length).values()
    )
    self._trained = 0.0  # seconds of steps alone
    self._profiling = False
    self._rows = sharding.batch_sharding(parts.mesh)
    self._share = share_of_process(
      self._rows, parts.config.data.batch, parts.config.data.length
    )

  @property
  def tokens_per_second(self) -> float:
    """Over this run's steps, without evaluations, saves and compilation."""
    steps = self._lap_step - self.first
    return steps * self._tokens / self._trained if self._trained else 0.0

  @property
  def outcome(self) -> report.Outcome:
    """What there is to say at the end."""
    return report.Outcome(
      self.done, self.validation, self.report, self.tokens_per_second
    )

  def run(self, request: StopRequest) -> bool:
    """Trains to the end, or until asked to stop; says which."""
    parts, config = self.parts, self.parts.config
    step: Any = self._compile() if self.done < config.steps else None
    parts.clock.lap()
    while self.done < config.steps:
      if self._should_stop(request):
        self._save()
        parts.checkpoints.wait()
        return False
      self._profile()
      batch = to_devices(self._next_batch(), self._rows, self._share)
      parts.state, metrics = step(parts.state, batch)
      self.done += 1
      self._after_step(metrics)
    self._drain()
    self._stop_profile()
    return True

  def _next_batch(self) -> dict[str, np.ndarray]:
    try:
      return next(self.parts.data)
    except ValueError as error:
      # Files can be mended, so nothing is lost: with several processes only
      # what came after the last checkpoint, as the others do not stop here.
      if self.done == self.first or jax.process_count() > 1:
        raise
      self._save()
      self.parts.checkpoints.wait()
      path = self.parts.checkpoints.path(self.done)
      raise ValueError(
        f'{error}; step {self.done} is saved in {path}'
      ) from None

  def _compile(self) -> Any:
    """The step, compiled for the shapes of the run's batches."""
    parts = self.parts
    shape = (parts.config.data.batch, parts.config.data.length)
    batch = {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)
      for name, dtype in arrays_of(parts.config.data.rows).items()
    }
    start = time.perf_counter()
    step = parts.step.lower(parts.abstract, batch).compile()
    seconds = time.perf_counter() - start
    parts.clock.add('compile', seconds)
    parts.console.say(f'compiled the step in {seconds:.1f} s')
    return step

  def _should_stop(self, request: StopRequest) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self.done)
    return bool(request)

  def _after_step(self, metrics: dict[str, jax.Array]) -> None:
    parts, config = self.parts, self.parts.config
    for value in metrics.values():
      value.copy_to_host_async()
    self._pending.append((self.done, metrics))
    parts.console.advance()
    while len(self._pending) > IN_FLIGHT:
      self._look()

    def due(every: int) -> bool:
      return self.done == config.steps or bool(every and self.done % every == 0)

    if due(config.eval_every):
      self._validate()
    if due(config.probe_every):
      self._probe()
    if due(config.checkpoint.every):
      self._save()

  def _rates(self, step: int) -> dict[str, float]:
    """Speed since the last logged step, and where the time went."""
    parts = self.parts
    seconds, spent = parts.clock.lap()
    waited = parts.data.wait_seconds - self._waited
    self._waited = parts.data.wait_seconds
    parts.clock.add('data', waited)
    parts.clock.lap()
    steps, self._lap_step = step - self._lap_step, step
    training = max(seconds - sum(spent.values()), 1e-9)
    self._trained += training
    speed = steps * self._tokens / training
    device = jax.devices()[0].device_kind
    mfu = utilisation(self._flops, speed, device, jax.device_count())
    total = parts.clock.seconds
    return {
      'tokens_per_second': speed,
      **({'mfu': mfu} if mfu else {}),
      'time/data': waited / max(seconds, 1e-9),
      **{
        f'time/{name}': parts.clock.total.get(name, 0.0) / total
        for name in ('compile', 'checkpoint', 'evaluation')
      },
    }

  def _look(self) -> None:
    """Takes in the oldest step whose metrics the host has not seen."""
    parts, config = self.parts, self.parts.config
    step, metrics = self._pending.popleft()
    bad = int(metrics['bad_in_row'])  # waits until the step is done
    if bad:
      parts.console.say(
        f'step {step}: loss {float(metrics["loss"])}, gradient norm '
        f'{float(metrics["grad_norm"])}: update skipped'
      )
    if bad >= config.max_bad_steps:
      raise RunStopped(
        f'loss or gradient was not finite in {bad} steps in a row, '
        f'{step - bad + 1} to {step}; {self._last_good()}'
      )
    if step == config.steps or step % config.log_every == 0:
      values = {name: np.asarray(x).item() for name, x in metrics.items()}
      values |= self._rates(step)
      parts.metrics.write(step, values)
      parts.console.show(step, config.steps, values)

  def _last_good(self) -> str:
    self.parts.checkpoints.wait()
    steps = self.parts.checkpoints.steps
    if not steps:
      return 'there is no checkpoint yet'
    path = self.parts.checkpoints.path(steps[-1])
    return f'the last good checkpoint is {path}'

  def _drain(self) -> None:
    while self._pending:
      self._look()

  def _validate(self) -> None:
    parts = self.parts
    self._drain()
    with parts.clock.spent('evaluation'), sharding.activate(parts.mesh):
      self.validation = parts.evaluation.validate(parts.state.params)
    found = self.validation.scalars()
    self._validated = self.done
    if found:
      parts.metrics.write(self.done, found)
      text = '  '.join(f'{name} {value:.4f}' for name, value in found.items())
      parts.console.say(f'step {self.done}/{parts.config.steps}  {text}')

  def _probe(self) -> None:
    parts = self.parts
    self._drain()
    with parts.clock.spent('evaluation'), sharding.activate(parts.mesh):
      self.report = parts.evaluation.probe(parts.state.params)
    if self.report is not None:
      parts.metrics.write(self.done, self.report.scalars())

  def _save(self) -> None:
    parts = self.parts
    self._drain()
    fresh = self._validated == self.done
    with parts.clock.spent('checkpoint'):
      parts.checkpoints.save(
        parts.state,
        parts.data.state().decode(),
        self.validation.loss if fresh else float('inf'),
      )

  def _profile(self) -> None:
    config = self.parts.config
    if not config.profile_steps:
      return
    if self.done == config.profile_start:
      self._drain()
      jax.profiler.start_trace(str(self.parts.workdir / 'profile'))
      self._profiling = True
    elif self.done == config.profile_start + config.profile_steps:
      self._stop_profile()

  def _stop_profile(self) -> None:
    if self._profiling:
      jax.block_until_ready(self.parts.state)
      jax.profiler.stop_trace()
      self._profiling = False
      self.parts.console.say(f'profile in {self.parts.workdir / "profile"}')

  def finish(self) -> None:
    """What a resumed, already finished run still lacks."""
    if np.isnan(self.validation.loss):
      self._validate()
    if self.report is None:
      self._probe()
    self._save()
    with self.parts.clock.spent('checkpoint'):
      self.parts.checkpoints.wait()


def run(config: RunConfig, workdir: pathlib.Path, command: str = '') -> None:
  """Trains, or goes on training, and prints the report.

  Args:
    config: All settings.
    workdir: Where checkpoints, metrics and figures go.
    command: What the user typed, to be shown for resuming.

  Raises:
    ValueError: Something the user has to change.
    RunStopped: Too many steps in a row were not finite.
    CheckpointError: A checkpoint could not be written.
  """
  console = Console()
  parts = build(config, workdir, console)
  console.say(report.opening(config, parts.state.params, workdir))
  loop = Loop(parts)
  try:
    with stop_on_signal() as request, sharding.activate(parts.mesh):
      console.start(loop.done, config.steps)
      finished = loop.run(request)
      if finished:
        loop.finish()
    console.stop()
    if finished:
      report.closing(parts, loop.outcome, command)
    else:
      console.say(
        f'{request.name or "asked to stop"}: saved step {loop.done} in '
        f'{parts.checkpoints.path(loop.done)}; go on with: {command}'
      )
  finally:
    console.stop()
    parts.metrics.close()
    parts.data.close()
    parts.checkpoints.close()
