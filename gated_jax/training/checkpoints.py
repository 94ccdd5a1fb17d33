"""Checkpoints: one folder per step, whole or not there at all.

A step's folder holds `params`, `rest` (optimizer, step, PRNG key, counters)
and `run` (the config, each process's place in the data, a fingerprint of
every array). Orbax writes beside it and renames when all is on disk, so a
killed save leaves the earlier steps as they were. The fingerprint is compared
after reading: a file that was damaged without becoming unreadable is found.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from gated_jax.checkpoint import CheckpointError
from gated_jax.checkpoint import one_line
from gated_jax.config import CheckpointConfig
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import from_dict
from gated_jax.config import names_with
from gated_jax.config import to_dict
from gated_jax.training.step import TrainState

Tree = Any


def check_same_run(
  old: dict[str, Any], new: RunConfig, folder: pathlib.Path
) -> dict[str, tuple[Any, Any]]:
  """Settings that differ and may; ValueError for those that may not."""
  # A setting that is younger than the checkpoint stood at its default.
  changed = differences(to_dict(from_dict(old)), to_dict(new))
  free = names_with(new, 'free')
  refused = {k: v for k, v in changed.items() if k not in free}
  if not refused:
    return changed
  shown = '; '.join(
    f'{name} is {a!r} there and {b!r} here' for name, (a, b) in refused.items()
  )
  what = (
    'holds another model'
    if any(name.startswith('model.') for name in refused)
    else 'was trained with other settings'
  )
  raise ValueError(
    f'{folder} {what}: {shown}. Use the same settings or another workdir'
  )


@jax.jit
def _sums(tree: Tree) -> list[jax.Array]:
  """Per array, the sum of its bits modulo 2^32."""

  def of(x):
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

  return [of(x) for x in jax.tree.leaves(tree)]


def fingerprint(state: TrainState) -> list[int]:
  """A number per array that changes when its contents do."""
  return [int(x) for x in _sums(state)]


def _digest(run: dict[str, Any]) -> str:
  """Of what JSON makes of it, so that it is the same after reading."""
  return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def gather(mine: Any) -> list[Any]:
  """JSON values of all processes, in order."""
  if jax.process_count() == 1:
    return [mine]
  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.array(len(text))))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(text)] = text
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(bytes(row[:size]))
    for row, size in zip(rows, sizes.ravel(), strict=True)
  ]


def _split(state: TrainState) -> tuple[Tree, dict[str, Tree]]:
  rest = {
    'step': state.step,
    'opt_state': state.opt_state,
    'key': state.key,
    'skipped': state.skipped,
    'bad_in_row': state.bad_in_row,
  }
  return state.params, rest


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  Args:
    folder: Where they lie; created when missing.
    config: Of the run; written into every checkpoint.
    say: Prints a line to the user.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    config: RunConfig,
    say: Callable[[str], None] = print,
  ):
    self.folder = folder
    self._config = config
    self._say = say
    self._broken = False
    self._started = -1  # the step whose save was begun last
    self._manager = self._open(config.checkpoint)

  def _open(self, config: CheckpointConfig) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self.folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics['loss'],
        best_mode='min',
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
          [
            checkpoint_managers.LatestN(config.keep_last),
            checkpoint_managers.BestN(
              get_metric_fn=lambda metrics: metrics['loss'],
              reverse=True,
              n=config.keep_best,
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=config.asynchronous,
      ),
    )

  @property
  def steps(self) -> list[int]:
    """Those on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def path(self, step: int) -> pathlib.Path:
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
    params, rest = _split(state)
    run = {
      'config': to_dict(self._config),
      'data': gather(data),
      'fingerprint': fingerprint(state),
    }
    run['digest'] = _digest(run)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(params),
          rest=ocp.args.StandardSave(rest),
          run=ocp.args.JsonSave(run),
        ),
        metrics={'loss': loss} if np.isfinite(loss) else None,
        force=True,
      )
    except Exception as error:
      raise self._failed(step, error) from error
    self._started = step

  def wait(self) -> None:
    """Until all that was started is on disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(self._started, error) from error

  def close(self) -> None:
    """Lets go of the threads; a failure that was reported is not again."""
    try:
      self._manager.close()
    except Exception as error:
      if not self._broken:
        raise self._failed(self._started, error) from error

  def _failed(self, step: int, error: Exception) -> CheckpointError:
    self._broken = True
    good = self._complete()
    kept = f'; the last good one is {self.path(good[-1])}' if good else ''
    return CheckpointError(
      f'could not save step {step} in {self.folder}{kept}: {one_line(error)}'
    )

  def _complete(self) -> list[int]:
    found = self.folder.iterdir() if self.folder.is_dir() else []
    return sorted(int(p.name) for p in found if p.name.isdigit())

  def restore(
    self, abstract: TrainState
  ) -> tuple[TrainState, Any, dict[str, tuple[Any, Any]]] | None:
    """The newest good step: state, place in the data, changed settings.

    None where there is no checkpoint yet. A damaged step is named, put aside
    under another name and the one before it taken.

    Args:
      abstract: Shapes, dtypes and shardings to restore as.
    """
    steps = self.steps
    for step in reversed(steps):
      try:
        run = self._read_run(step)
      except Exception as error:
        self._put_aside(step, error)
        continue
      changed = check_same_run(run['config'], self._config, self.folder)
      if len(run['data']) != jax.process_count():
        raise ValueError(
          f'{self.path(step)} was saved by {len(run["data"])} processes and '
          f'cannot be resumed by {jax.process_count()}: each has its own '
          'place in the data'
        )
      try:
        state = self._read_state(step, abstract, run['fingerprint'])
      except Exception as error:
        self._put_aside(step, error)
        continue
      return state, run['data'][jax.process_index()], changed
    damaged = sorted(path.name for path in self.folder.glob('damaged-*'))
    if damaged:  # starting anew would be what nobody asked for
      raise CheckpointError(
        f'no checkpoint in {self.folder} could be read: remove '
        f'{", ".join(damaged)} to start from the beginning'
      )
    return None

  def _read_run(self, step: int) -> dict[str, Any]:
    found = self._manager.restore(
      step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
    )['run']
    if found.pop('digest', '') != _digest(found):
      raise CheckpointError('contents differ from what was saved')
    return found

  def _read_state(
    self, step: int, abstract: TrainState, expected: list[int]
  ) -> TrainState:
    params, rest = _split(abstract)
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        rest=ocp.args.StandardRestore(rest),
      ),
    )
    state = TrainState(params=found['params'], **found['rest'])
    if fingerprint(state) != expected:
      raise CheckpointError('contents differ from what was saved')
    return state

  def _put_aside(self, step: int, error: Exception) -> None:
    path = self.path(step)
    aside = path.with_name(f'damaged-{step}')
    self._say(
      f'checkpoint {path} is damaged ({one_line(error)}); it is now '
      f'{aside.name}, going back to the one before'
    )
    if jax.process_index() == 0:
      number = 1
      while aside.exists():
        number += 1
        aside = path.with_name(f'damaged-{step}-{number}')
      path.rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'put aside {step}')
    self._manager.reload()
