"""Reads the steps of a run, in all of its processes at once.

A step that one process cannot read is damaged for all of them: it is named and
put aside under another name, and the caller takes the one before. A bucket that
does not answer says nothing of a step, which stays where it is.
"""

import dataclasses
import os
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

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
from gated_jax.checkpoint.folder import find
from gated_jax.checkpoint.parameters import read_arrays
from gated_jax.checkpoint.parameters import read_base
from gated_jax.checkpoint.sums import records
from gated_jax.config import RunConfig
from gated_jax.paths import Path
from gated_jax.processes import first_problem
from gated_jax.training.step import TrainState

Tree = Any


class CheckpointOutOfReach(CheckpointError, BucketError):
  """A bucket did not answer, after all repeats; it may do so later."""


def by_folder(state: TrainState) -> dict[str, Tree]:
  """The state by the folder that its arrays go to."""
  rest = {
    'step': state.step,
    'opt_state': state.opt_state,
    'key': state.key,
    'skipped': state.skipped,
    'bad_in_row': state.bad_in_row,
  }
  return {'params': state.params, 'rest': rest}


class StepReader:
  """Reads steps, and knows the base of the one that it read last.

  Args:
    config: of the run that goes on.
    say: prints a line to the user.
  """

  def __init__(self, config: RunConfig, say: Callable[[str], None]):
    self._config = config
    self._say = say
    # Where arrays lie that the run need not write; None: it writes all.
    self.base: Base | None = None

  def state(
    self, path: Path, abstract: TrainState, run: Mapping[str, Any]
  ) -> TrainState | None:
    """The state of a step; None where it was put aside.

    Args:
      path: the step's folder.
      abstract: shapes, dtypes and shardings to restore as.
      run: what the step says of itself.

    Raises:
      NoBase: what it leaves with its base is not there.
      CheckpointError: the base is damaged.
    """
    base = base_in(run)
    shapes = by_folder(abstract)
    shapes['params'], rest = divide(shapes['params'], base)
    trees = self.together(path, lambda: read_arrays(path, shapes))
    if trees is None:
      return None
    sums: dict[str, Any] = {}
    for item, tree in trees.items():
      sums |= records(tree, item)

    def check() -> bool:
      """Compares what was read with the sums written beside it."""
      check_arrays(path, sums, run.get('arrays'))
      return True

    if not self.together(path, check):
      return None
    params = trees['params']
    if base is not None:
      params = join(params, self._read_base(path, run, rest))
    return TrainState(params=params, **trees['rest'])

  def _read_base(self, path: Path, run: Mapping[str, Any], rest: Tree) -> Tree:
    """What a step leaves with its base, which is no fault of the step.

    Raises:
      NoBase: the base is gone, or is another one.
      CheckpointError: it is damaged, or the run would begin at another one.
    """
    start = self._config.init_from
    place, params, problem, missing = path, None, '', False
    try:
      place = find_base(path, run, [start] if start else [])
      # The first folder may hold a later step by now; another one is a mistake.
      if start not in ('', run['config']['init_from']) and find(start) != place:
        raise CheckpointError(
          f'init_from={start!r} holds other parameters than {place}, beside '
          'which this run was trained: name that one'
        )
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

  def together(self, path: Path, read: Callable[[], Any]) -> Any:
    """Reads in all processes; None where one could not, and the step went.

    Args:
      path: the step's folder.
      read: what each process does.

    Raises:
      CheckpointOutOfReach: a bucket did not answer.
    """
    value, away, problem = None, '', ''
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
    self._put_aside(path, problem)
    return None

  def _put_aside(self, path: Path, problem: str) -> None:
    step = path.name
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
