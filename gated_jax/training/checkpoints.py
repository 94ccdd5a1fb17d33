"""The checkpoints of a run: one folder per step, whole or not there at all.

A step's folder holds `params`, `rest` (optimizer, step, PRNG key, counters)
and `run` (the config, each process's place in the data, the held-out loss, the
sum of every array). What a run never changes may lie in another checkpoint, the
base: see gated_jax/checkpoint/base.py. Orbax writes beside it and renames when
all is on disk; in a bucket it writes there at once, and an object that says so
at last. Either way a killed save leaves the earlier steps as they were. What
was read is compared with the sums: gated_jax/checkpoint/sums.py says how.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gated_jax import damage
from gated_jax import paths
from gated_jax.bucket_requests import bucket_error
from gated_jax.bucket_requests import cause_in_bucket
from gated_jax.checkpoint.base import Base
from gated_jax.checkpoint.base import divide
from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import one_line
from gated_jax.checkpoint.folder import read_run
from gated_jax.checkpoint.folder import seal
from gated_jax.checkpoint.folder import steps_in
from gated_jax.checkpoint.sums import array_names
from gated_jax.checkpoint.sums import records
from gated_jax.config import CheckpointConfig
from gated_jax.config import RunConfig
from gated_jax.config import to_dict
from gated_jax.paths import Path
from gated_jax.processes import gather
from gated_jax.training.best_steps import BestSteps
from gated_jax.training.best_steps import loss_of
from gated_jax.training.continuation import check_continues
from gated_jax.training.half_steps import finish_removals
from gated_jax.training.step import TrainState
from gated_jax.training.step_reader import CheckpointOutOfReach
from gated_jax.training.step_reader import StepReader
from gated_jax.training.step_reader import by_folder

Tree = Any


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  Args:
    folder: Where they lie; created when missing.
    config: Of the run; written into every checkpoint.
    say: Prints a line to the user.
    loss: Name of a loss of the caller's own; '': the model's.
  """

  def __init__(
    self,
    folder: Path,
    config: RunConfig,
    say: Callable[[str], None] = print,
    loss: str = '',
  ):
    self.folder = folder
    self._own_loss = loss
    self._config = config
    self._say = say
    self._broken = False
    self.base: Base | None = None  # where arrays lie that are not written here
    self._records_of_base: dict[str, Any] = {}
    self._started = -1  # the step whose save was begun last
    # Steps that have no list of files yet.
    self._unlisted = finish_removals(self.folder)
    losses = {step: loss_of(self.path(step)) for step in steps_in(self.folder)}
    # Every process must keep the same steps, also where one cannot read.
    known = {int(step): loss for step, loss in gather(losses)[0].items()}
    self._best = BestSteps(config.checkpoint.keep_best, known)
    self._manager = self._open(config.checkpoint)

  def _open(self, config: CheckpointConfig) -> ocp.CheckpointManager:
    latest = checkpoint_managers.LatestN(config.keep_last)
    return ocp.CheckpointManager(
      os.fspath(paths.absolute(self.folder)),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
          [latest, self._best]
        ),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=config.asynchronous,
      ),
    )

  @property
  def steps(self) -> list[int]:
    """Those on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def path(self, step: int) -> Path:
    """The folder of a step."""
    return self.folder / str(step)

  def save(
    self, state: TrainState, data: Any, loss: float = float('inf')
  ) -> None:
    """Starts to write a step; an earlier one's failure shows here.

    Args:
      state: After the step.
      data: This process's place in the data, as JSON values.
      loss: Of validation, which keep-best goes by; inf: not measured.
    """
    self.wait()
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    trees = by_folder(state)
    trees['params'], rest = divide(trees['params'], self.base)
    if rest and not self._records_of_base:  # these arrays never change
      self._records_of_base = records(rest, 'params')
    arrays = dict(self._records_of_base)
    for item, tree in trees.items():
      arrays |= records(tree, item)
    run: dict[str, Any] = {
      'config': to_dict(self._config),
      'data': gather(data),
      'loss': loss if math.isfinite(loss) else None,
      'arrays': arrays,
      'own_loss': self._own_loss,
    }
    if self.base is not None:
      run['base'] = self.base.seen_from(self.path(step))
    self._best.losses[step] = loss
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          run=ocp.args.JsonSave(seal(run)),
          **{k: ocp.args.StandardSave(tree) for k, tree in trees.items()},
        ),
        force=True,
      )
    except Exception as error:
      raise self._failed(step, error) from error
    self._started = step
    self._unlisted.add(step)

  def wait(self) -> None:
    """Waits until all that was started is on disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(self._started, error) from error
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):  # the next call tries again
        for step in sorted(self._unlisted):
          if paths.is_folder(self.path(step)):
            damage.write_list(self.path(step))
          self._unlisted.discard(step)

  def close(self) -> None:
    """Lets go of the threads; a failure that was reported is not again."""
    try:
      self._manager.close()
    except Exception as error:
      if not self._broken:
        raise self._failed(self._started, error) from error

  def _failed(self, step: int, error: Exception) -> CheckpointError:
    self._broken = True
    cause = cause_in_bucket(error) if paths.in_bucket(self.folder) else None
    if cause is not None:  # a listing would have to wait as long again
      reason = bucket_error(cause, self.folder)
      return CheckpointOutOfReach(f'could not save step {step}: {reason}')
    good: list[int] = []
    with contextlib.suppress(OSError):
      good = steps_in(self.folder)
    last = f'; the last good one is {self.path(good[-1])}' if good else ''
    return CheckpointError(
      f'could not save step {step} in {self.folder}{last}: {one_line(error)}'
    )

  def restore(
    self, abstract: TrainState
  ) -> tuple[TrainState, Any, dict[str, tuple[Any, Any]]] | None:
    """The newest good step: state, place in the data, changed settings.

    None where there is no checkpoint yet. A damaged step is named, put aside
    under another name and the one before it taken.

    Args:
      abstract: Shapes, dtypes and shardings to restore as.

    Raises:
      CannotResume: this run has other settings.
      CheckpointError: there are steps, and none of them can be read.
      NoBase: what they leave with their base is not there.
    """
    reader = StepReader(self._config, self._say)
    names = [
      name
      for item, tree in by_folder(abstract).items()
      for name in array_names(tree, item)
    ]
    for step in reversed(self.steps):
      path = self.path(step)
      run = reader.together(path, functools.partial(read_run, path))
      if run is not None:
        changed = check_continues(
          run, self._config, self._own_loss, names, path
        )
        state = reader.state(path, abstract, run)
        if state is not None:
          self.base = reader.base
          return state, run['data'][jax.process_index()], changed
      self._manager.reload()  # the step was put aside
    aside = [path.name for path in paths.matching(self.folder / 'damaged-*')]
    if aside:  # never restart from scratch silently
      raise CheckpointError(
        f'no checkpoint in {self.folder} could be read: remove '
        f'{", ".join(aside)} to start from the beginning'
      )
    return None
