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
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from gated_jax import damage
from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.bucket_requests import bucket_error
from gated_jax.bucket_requests import cause_in_bucket
from gated_jax.checkpoint.base import Base
from gated_jax.checkpoint.base import NoBase
from gated_jax.checkpoint.base import base_in
from gated_jax.checkpoint.base import divide
from gated_jax.checkpoint.base import find_base
from gated_jax.checkpoint.base import join
from gated_jax.checkpoint.folder import COMMIT
from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import check_arrays
from gated_jax.checkpoint.folder import damaged
from gated_jax.checkpoint.folder import one_line
from gated_jax.checkpoint.folder import read_run
from gated_jax.checkpoint.folder import seal
from gated_jax.checkpoint.folder import steps_in
from gated_jax.checkpoint.parameters import read_arrays
from gated_jax.checkpoint.parameters import read_base
from gated_jax.checkpoint.sums import array_names
from gated_jax.checkpoint.sums import records
from gated_jax.config import CheckpointConfig
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import from_dict
from gated_jax.config import names_with
from gated_jax.config import to_dict
from gated_jax.config import upgrade
from gated_jax.paths import Path
from gated_jax.processes import first_problem
from gated_jax.processes import gather
from gated_jax.training.step import TrainState

Tree = Any


class CheckpointOutOfReach(CheckpointError, BucketError):
  """A bucket took no checkpoint, after all repeats; it may take the next."""


class CannotResume(ValueError):
  """A checkpoint is good, but this run would not be its continuation.

  `weights` is the checkpoint that a new run can start from; None: this model
  cannot take its parameters.
  """

  def __init__(self, message: str, weights: Path | None):
    super().__init__(message)
    self.weights = weights


def check_same_run(
  old: dict[str, Any], new: RunConfig, step: Path
) -> dict[str, tuple[Any, Any]]:
  """Settings that differ and may; CannotResume for those that may not."""
  # A setting that is younger than the checkpoint stood at its default.
  changed = differences(to_dict(from_dict(upgrade(old))), to_dict(new))
  free = names_with(new, 'free')
  refused = {k: v for k, v in changed.items() if k not in free}
  if not refused:
    return changed
  shown = '; '.join(
    f'{name} is {a!r} there and {b!r} here' for name, (a, b) in refused.items()
  )
  other_model = any(name.startswith('model.') for name in refused)
  what = 'holds another model' if other_model else 'is of other settings'
  raise CannotResume(f'{step} {what}: {shown}', None if other_model else step)


def _check_same_loss(
  old: str | None, new: str, step: Path
) -> dict[str, tuple[Any, Any]]:
  """The names of two losses of one's own that differ.

  Args:
    old: the name in a step, '' for the model's own; None: it is older.
    new: that of this run.
    step: the folder.

  Raises:
    CannotResume: one of them is the model's own.
  """
  if old is None or old == new:
    return {}
  if old and new:  # a function may be given a better name
    return {'loss': (old, new)}
  there, here = (
    f'the loss {x}' if x else "the model's loss" for x in (old, new)
  )
  raise CannotResume(f'{step} was trained by {there}, and not {here}', step)


def _split(state: TrainState) -> dict[str, Tree]:
  """The state by the folder that its arrays go to."""
  rest = {
    'step': state.step,
    'opt_state': state.opt_state,
    'key': state.key,
    'skipped': state.skipped,
    'bad_in_row': state.bad_in_row,
  }
  return {'params': state.params, 'rest': rest}


def _check_same_arrays(
  abstract: TrainState, recorded: Mapping[str, Any] | None, path: Path
) -> None:
  """CannotResume where a step lacks arrays, as another optimizer's does."""
  for item, tree in _split(abstract).items():
    for name in array_names(tree, item):
      if recorded is not None and name not in recorded:
        raise CannotResume(
          f'{path} has no array {name}: it was trained by another optimizer',
          path,
        )


def _loss_of(step: Path) -> float:
  """The held-out loss that a step was saved with; NaN: not known."""
  try:
    run = read_run(step)
    if 'loss' not in run:  # earlier checkpoints have a file of its own
      run = json.loads(paths.read_bytes(step / 'metrics' / 'metrics'))
    return float(run['loss'])
  except BucketError:  # the best step must not go because it was out of reach
    raise
  except (CheckpointError, OSError, ValueError, TypeError):
    return math.nan


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the steps of the lowest held-out losses.

  Orbax can read losses back as well, but no step could be restored any more
  once one of those files was damaged.
  """

  def __init__(self, count: int, losses: dict[int, float]):
    self.losses = losses
    self._count = count

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> Sequence[bool]:
    """Marks the checkpoints that are among the best."""
    del context
    known = [
      (self.losses[info.step], info.step)
      for info in checkpoints
      if math.isfinite(self.losses.get(info.step, math.nan))
    ]
    best = {step for _, step in sorted(known)[: self._count]}
    return [info.step in best for info in checkpoints]


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
    self._unlisted: set[int] = set()  # steps that have no list of files yet
    self._finish_removals()
    losses = {step: _loss_of(self.path(step)) for step in steps_in(self.folder)}
    # Every process must keep the same steps, also where one cannot read.
    known = {int(step): loss for step, loss in gather(losses)[0].items()}
    self._best = _Best(config.checkpoint.keep_best, known)
    self._manager = self._open(config.checkpoint)

  def _finish_removals(self) -> None:
    """Removes the rest of steps that a kill left half written or half removed.

    A bucket has no folders to be renamed first, so what is left of a removed
    step can look whole. It is an older one: the newest is never removed, and
    each gets its list of files before the next is saved. Orbax removes half
    written steps, too, but fails where that leaves nothing to list.
    """
    problem = ''
    if paths.in_bucket(self.folder) and jax.process_index() == 0:
      try:
        for step in self._unfinished():
          paths.remove_folder(self.path(step))
        *older, newest = steps_in(self.folder) or [-1]
        for step in older:
          if not damage.has_all_files(self.path(step)):
            paths.remove_folder(self.path(step))
        if newest >= 0 and not damage.has_list(self.path(newest)):
          self._unlisted.add(newest)
      except OSError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem:
      raise CheckpointError(problem)

  def _unfinished(self) -> set[int]:
    """The steps in a bucket that have objects and no mark of being whole."""
    depth = len(self.folder.parts)
    names = {file.parts[depth] for file in paths.files_below(self.folder)}
    begun = {int(name) for name in names if name.isdecimal()}
    return begun - set(steps_in(self.folder))

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
    trees = _split(state)
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
    for step in reversed(self.steps):
      path = self.path(step)
      run = self._together(step, functools.partial(read_run, path))
      if run is None:
        continue
      changed = check_same_run(run['config'], self._config, path)
      changed |= _check_same_loss(run.get('own_loss'), self._own_loss, path)
      if len(run['data']) != jax.process_count():
        raise CannotResume(
          f'{path} was saved by {len(run["data"])} processes and cannot be '
          f'resumed by {jax.process_count()}: each has its own place in the '
          'data',
          path,
        )
      _check_same_arrays(abstract, run.get('arrays'), path)
      state = self._read_state(step, abstract, run)
      if state is None:
        continue
      return state, run['data'][jax.process_index()], changed
    aside = [path.name for path in paths.matching(self.folder / 'damaged-*')]
    if aside:  # never restart from scratch silently
      raise CheckpointError(
        f'no checkpoint in {self.folder} could be read: remove '
        f'{", ".join(aside)} to start from the beginning'
      )
    return None

  def _read_state(
    self, step: int, abstract: TrainState, run: Mapping[str, Any]
  ) -> TrainState | None:
    """The state of a step; None where it was put aside."""
    path, base = self.path(step), base_in(run)
    shapes = _split(abstract)
    shapes['params'], rest = divide(shapes['params'], base)
    trees = self._together(step, lambda: read_arrays(path, shapes))
    if trees is None:
      return None
    sums: dict[str, Any] = {}
    for item, tree in trees.items():
      sums |= records(tree, item)

    def check() -> bool:
      """Compares what was read with the sums written beside it."""
      check_arrays(path, sums, run.get('arrays'))
      return True

    if not self._together(step, check):
      return None
    params = trees['params']
    if base is not None:
      params = join(params, self._read_base(path, run, rest))
    return TrainState(params=params, **trees['rest'])

  def _read_base(self, path: Path, run: Mapping[str, Any], rest: Tree) -> Tree:
    """What a step leaves with its base, which is no fault of the step.

    Raises:
      NoBase: the base is gone, or is another one.
      CheckpointError: it is damaged.
    """
    start = self._config.init_from
    place, params, problem, missing = path, None, '', False
    try:
      place = find_base(path, run, [start] if start else [])
      params = read_base(path, run, rest, place)
    except Exception as error:
      problem, missing = str(error), isinstance(error, NoBase)
    problem = first_problem(problem)
    if problem and missing:
      raise NoBase(f'{problem}, or give it as --config.init_from')
    if problem:
      raise CheckpointError(f'the base of {path}: {problem}')
    base = base_in(run)
    if base is not None and not self._config.checkpoint.whole:
      here = os.fspath(paths.absolute(place))
      self.base = dataclasses.replace(base, path=here)
    return params

  def _together(self, step: int, read: Callable[[], Any]) -> Any:
    """Reads in all processes; None where one could not, and the step went."""
    value, away, problem = None, '', ''
    path = self.path(step)
    try:
      value = read()
    except Exception as error:
      cause = cause_in_bucket(error)
      if cause is not None:
        away = str(bucket_error(cause, path) or cause)
      elif isinstance(error, CheckpointError):
        problem = str(error)
      else:
        problem = str(damaged(path, error))
    away = first_problem(away)
    if away:  # nothing is known of the step, so it stays where it is
      raise CheckpointOutOfReach(away)
    problem = first_problem(problem)
    if not problem:
      return value
    self._put_aside(step, problem)
    return None

  def _put_aside(self, step: int, problem: str) -> None:
    path = self.path(step)
    aside = path.with_name(f'damaged-{step}')
    number = 1
    while paths.exists(aside):
      number += 1
      aside = path.with_name(f'damaged-{step}-{number}')
    self._say(
      f'checkpoint {problem}; it is now {aside.name}, going back to the one '
      'before'
    )
    if jax.process_count() > 1:  # all have seen which name is free
      multihost_utils.sync_global_devices(f'name for {step}')
    if jax.process_index() == 0:
      paths.move_folder(path, aside, last=COMMIT)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'put aside {step}')
    self._manager.reload()
