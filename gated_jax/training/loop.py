"""A run from its settings to its report: build, resume, train, sum up.

    config -> build (mesh, model, optimizer, data) -> restore -> compile
      -> steps, each of them dispatched without waiting for the one before
      -> final evaluation, checkpoint, figures and report

Read `gated_jax/training/step.py` for what one step computes, `build.py` for
how it is put together, `checkpoints.py` for what is kept and `report.py` for
what is said at the end.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from gated_jax import sharding
from gated_jax.bucket_requests import BucketError
from gated_jax.cli import TryLater
from gated_jax.config import RunConfig
from gated_jax.data.batch import arrays_of
from gated_jax.evals.likelihood import Likelihood
from gated_jax.paths import Path
from gated_jax.paths import expand
from gated_jax.training import commands
from gated_jax.training import report
from gated_jax.training.build import RunState
from gated_jax.training.build import build
from gated_jax.training.build import check_same_config
from gated_jax.training.console import Console
from gated_jax.training.console import StopRequest
from gated_jax.training.console import stop_on_signal
from gated_jax.training.continuation import CannotResume
from gated_jax.training.custom import Batch
from gated_jax.training.custom import Callback
from gated_jax.training.custom import Custom
from gated_jax.training.custom import Progress
from gated_jax.training.lock import locked
from gated_jax.training.rows import rows_of_process
from gated_jax.training.rows import to_devices
from gated_jax.training.speed import Profile
from gated_jax.training.speed import Speed
from gated_jax.training.step import LossFunction
from gated_jax.training.step import model_loss
from gated_jax.training.workdir import check_workdir

# Steps dispatched ahead of the one whose metrics the host has seen: enough to
# keep the device busy, few enough to notice trouble at once.
IN_FLIGHT = 2


class RunStopped(RuntimeError):
  """The run cannot go on; what was saved is good."""


class Loop:
  """The steps of a run, dispatched ahead of what the host has seen.

  Args:
    run: what `build` made.
    check_lock: raises where another run has taken the workdir.
  """

  def __init__(
    self, run: RunState, check_lock: Callable[[], None] = lambda: None
  ):
    self.run = run
    self._check_lock = check_lock
    self.first = self.done = int(run.state.step)
    self.validation = Likelihood(0.0, 0.0)
    self._validated = -1  # the step it was measured at
    self.report: Any = None
    self._pending: collections.deque[Any] = collections.deque()
    self.asked_to_stop = False  # by a callback
    self._rows = sharding.batch_sharding(run.mesh)
    self._own = rows_of_process(
      self._rows, run.config.data.batch, run.config.data.length
    )
    self._speed = Speed(run, self.first, self._own.parts)
    self._profile = Profile(run)

  @property
  def result(self) -> report.RunResult:
    """The figures that the report closes with."""
    return report.RunResult(
      self.done,
      self.validation,
      self.report,
      self._speed.tokens_per_second,
    )

  def train(self, request: StopRequest) -> bool:
    """Trains to the end, or until asked to stop; says which."""
    run, config = self.run, self.run.config
    step: Any = self._compile() if self.done < config.steps else None
    run.clock.lap()
    while self.done < config.steps:
      if self._should_stop(request):
        self._save()
        run.checkpoints.wait()
        return False
      if self._profile.is_due(self.done):
        self._drain()
        self._profile.start()
      self._profile.stop(self.done)
      batch = to_devices(self._next_batch(), self._rows, self._own)
      run.state, metrics = step(run.state, batch)
      self.done += 1
      self._after_step(metrics)
    self._drain()
    self._profile.stop()
    return True

  def _next_batch(self) -> dict[str, np.ndarray]:
    try:
      return next(self.run.data)
    except ValueError as error:
      # Files can be mended, so nothing is lost: with several processes only
      # what came after the last checkpoint, as the others do not stop here.
      if self.done == self.first or jax.process_count() > 1:
        raise
      self._save()
      self.run.checkpoints.wait()
      path = self.run.checkpoints.path(self.done)
      kind = type(error) if isinstance(error, TryLater) else ValueError
      raise kind(f'{error}; step {self.done} is saved in {path}') from None

  def _compile(self) -> Any:
    """The step, compiled for the shapes of the run's batches."""
    run = self.run
    shape = (run.config.data.batch, run.config.data.length)
    batch = {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)
      for name, dtype in arrays_of(run.config.data.rows).items()
    }
    start = time.perf_counter()
    step = run.step.lower(run.abstract, batch).compile()
    seconds = time.perf_counter() - start
    run.clock.add('compile', seconds)
    run.console.say(f'compiled the step in {seconds:.1f} s')
    return step

  def _should_stop(self, request: StopRequest) -> bool:
    if self.asked_to_stop:
      return True
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self.done)
    return bool(request)

  def _after_step(self, metrics: dict[str, jax.Array]) -> None:
    run, config = self.run, self.run.config
    for value in metrics.values():
      value.copy_to_host_async()
    self._pending.append((self.done, metrics))
    run.console.advance()
    while len(self._pending) > IN_FLIGHT:
      self._look()

    def due(every: int) -> bool:
      """Tells whether something happens after this step."""
      return self.done == config.steps or bool(every and self.done % every == 0)

    if run.callbacks and due(config.log_every):
      self._drain()  # a callback sees the state after its own step
    if due(config.eval_every):
      self._validate()
    if due(config.probe_every):
      self._probe()
    if due(config.checkpoint.every):
      self._save()

  def _look(self) -> None:
    """Takes in the oldest step whose metrics the host has not seen."""
    run, config = self.run, self.run.config
    step, metrics = self._pending.popleft()
    bad = int(metrics['bad_in_row'])  # waits until the step is done
    if bad:
      run.console.say(
        f'step {step}: loss {float(metrics["loss"])}, gradient norm '
        f'{float(metrics["grad_norm"])}: update skipped'
      )
    elif not float(metrics['tokens']):
      run.console.say(f'step {step}: the batch has no target: update skipped')
    if bad >= config.max_bad_steps:
      raise RunStopped(
        f'loss or gradient was not finite in {bad} steps in a row, '
        f'{step - bad + 1} to {step}; {self._last_good()}'
      )
    if step == config.steps or step % config.log_every == 0:
      values = {name: np.asarray(x).item() for name, x in metrics.items()}
      values |= self._speed.since_last(step)
      run.metrics.write(step, values)
      run.console.show(step, config.steps, values)
      progress = Progress(step, values, run.state)
      for callback in run.callbacks:
        self.asked_to_stop |= callback(progress) is True

  def _last_good(self) -> str:
    self.run.checkpoints.wait()
    steps = self.run.checkpoints.steps
    if not steps:
      return 'there is no checkpoint yet'
    path = self.run.checkpoints.path(steps[-1])
    return f'the last good checkpoint is {path}'

  def _drain(self) -> None:
    while self._pending:
      self._look()

  def _validate(self) -> None:
    run = self.run
    self._drain()
    with run.clock.spent('evaluation'), sharding.activate(run.mesh):
      self.validation = run.evaluation.validate(run.state.params)
    scalars = self.validation.scalars()
    self._validated = self.done
    if scalars:
      run.metrics.write(self.done, scalars)
      text = '  '.join(f'{name} {value:.4f}' for name, value in scalars.items())
      run.console.say(f'step {self.done}/{run.config.steps}  {text}')

  def _probe(self) -> None:
    run = self.run
    self._drain()
    with run.clock.spent('evaluation'), sharding.activate(run.mesh):
      self.report = run.evaluation.probe(run.state.params)
    if self.report is not None:
      run.metrics.write(self.done, self.report.scalars())

  def _save(self) -> None:
    run = self.run
    self._drain()
    fresh = self._validated == self.done
    with run.clock.spent('checkpoint'):
      self._check_lock()
      run.metrics.save()  # a run resumed from here has all lines before it
      run.checkpoints.save(
        run.state,
        run.data.state().decode(),
        self.validation.loss if fresh else float('inf'),
      )

  def finish(self) -> None:
    """Measures and saves what a run that came back finished still lacks."""
    if np.isnan(self.validation.loss):
      self._validate()
    if self.report is None:
      self._probe()
    self._save()
    with self.run.clock.spent('checkpoint'):
      self.run.checkpoints.wait()


def run(
  config: RunConfig,
  workdir: str | os.PathLike[str],
  command: str = '',
  *,
  optimizer: optax.GradientTransformation | None = None,
  data: Iterable[Batch] | None = None,
  held_out: Sequence[Batch] = (),
  callbacks: Sequence[Callback] = (),
  loss: LossFunction = model_loss,
) -> report.RunResult:
  """Trains, or goes on training, and prints the report.

  Args:
    config: All settings.
    workdir: A folder for checkpoints, metrics and figures, on a disk or in a
      bucket of Google Cloud Storage.
    command: What the user typed, to be shown with other flags.
    optimizer: In place of the config's, with its own clipping and schedule.
    data: Batches of this process's rows, as `gated_jax/data/batch.py` has them,
      in place of the config's. Iterators of Grain resume by their state,
      others by reading again what was used.
    held_out: Batches to validate on, where `data` is given.
    callbacks: Called with a `Progress` at every logged step; one that returns
      True saves and ends the run.
    loss: In place of the model's: (model, params, batch, key) to a `Loss` of
      `gated_jax/model/decoder.py`, whose means go over tokens by its weight.
      Held-out text is measured by the model's own.

  Returns:
    The figures that the run ended with, and the signal that stopped it.

  Raises:
    ValueError: Something the user has to change.
    WorkdirInUse: Another run has the workdir.
    RunStopped: Too many steps in a row were not finite.
    CheckpointError: A checkpoint could not be written, or none be read.
  """
  custom = Custom(optimizer, data, held_out, callbacks, loss)
  console = Console()
  folder = expand(workdir)
  check_workdir(folder)
  check_same_config(config)
  with locked(folder, console.say) as check_lock:
    try:
      run_state = build(config, folder, console, custom)
    except CannotResume as error:
      raise ValueError(_way_on(error, command, folder)) from error
    is_away = False
    try:
      return _train(run_state, command, check_lock)
    except BucketError:
      is_away = True
      raise
    finally:
      console.stop()
      run_state.metrics.close()
      run_state.data.close()
      if not is_away:  # what still writes there may go on trying for long
        run_state.checkpoints.close()


def _train(
  run_state: RunState, command: str, check_lock: Callable[[], None]
) -> report.RunResult:
  """Takes all steps, or those until a signal, and says what came out."""
  config, console = run_state.config, run_state.console
  console.say(report.opening(run_state))
  loop = Loop(run_state, check_lock)
  with stop_on_signal() as request, sharding.activate(run_state.mesh):
    console.start(loop.done, config.steps)
    finished = loop.train(request)
    if finished:
      loop.finish()
  console.stop()
  result = loop.result
  if finished:
    report.closing(run_state, result, command)
    return result
  # Without a name another process had the signal.
  stopped = 'callback' if loop.asked_to_stop else request.name or 'SIGTERM'
  console.say(
    f'{stopped}: saved step {loop.done} in '
    f'{run_state.checkpoints.path(loop.done)}; go on with: '
    f'{commands.again(command)}'
  )
  return dataclasses.replace(result, stopped_by=stopped)


def _way_on(error: CannotResume, command: str, workdir: Path) -> str:
  """The message of an error with what to do instead."""
  if error.weights is None:
    return f'{error}. Use the same settings or another workdir'
  anew = commands.anew(command, workdir, error.weights)
  return (
    f'{error}. Use the same settings, or start a new run from these weights: '
    f'{anew}'
  )
