"""What a killed run leaves of steps in a bucket, where nothing is renamed."""

import jax

from gated_jax import damage
from gated_jax import paths
from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import steps_in
from gated_jax.paths import Path
from gated_jax.processes import first_problem


def finish_removals(folder: Path) -> set[int]:
  """Removes the rest of steps that a kill left half written or half removed.

  A bucket has no folders to be renamed first, so what is left of a removed
  step can look whole. It is an older one: the newest is never removed, and
  each gets its list of files before the next is saved. Orbax removes half
  written steps, too, but fails where that leaves nothing to list.

  Args:
    folder: that holds the steps of a run.

  Returns:
    Steps that are whole and have no list of files yet.

  Raises:
    CheckpointError: the bucket does not answer.
  """
  problem, unlisted = '', set[int]()
  if paths.in_bucket(folder) and jax.process_index() == 0:
    try:
      for step in _half_written(folder):
        paths.remove_folder(folder / str(step))
      *older, newest = steps_in(folder) or [-1]
      for step in older:
        if not damage.has_all_files(folder / str(step)):
          paths.remove_folder(folder / str(step))
      if newest >= 0 and not damage.has_list(folder / str(newest)):
        unlisted.add(newest)
    except OSError as error:
      problem = str(error)
  problem = first_problem(problem)
  if problem:
    raise CheckpointError(problem)
  return unlisted


def _half_written(folder: Path) -> set[int]:
  """The steps in a bucket that have objects and no mark of being whole."""
  depth = len(folder.parts)
  names = {file.parts[depth] for file in paths.files_below(folder)}
  begun = {int(name) for name in names if name.isdecimal()}
  return begun - set(steps_in(folder))
