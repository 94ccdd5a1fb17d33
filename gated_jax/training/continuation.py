"""Whether a run goes on from a checkpoint, or would be another one.

A good checkpoint of other settings is no place to go on from: what comes out
would be neither run. Settings whose role is `free` may differ.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax

from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import from_dict
from gated_jax.config import names_with
from gated_jax.config import to_dict
from gated_jax.config import upgrade
from gated_jax.paths import Path

# Setting, then its value in the checkpoint and in this run.
Changes = dict[str, tuple[Any, Any]]


class CannotResume(ValueError):
  """A checkpoint is good, but this run would not be its continuation.

  `weights` is the checkpoint that a new run can start from; None: this model
  cannot take its parameters.
  """

  def __init__(self, message: str, weights: Path | None):
    super().__init__(message)
    self.weights = weights


def check_continues(
  run: Mapping[str, Any],
  config: RunConfig,
  own_loss: str,
  arrays: Iterable[str],
  step: Path,
) -> Changes:
  """Settings that differ and may.

  Args:
    run: what the checkpoint says of itself.
    config: of this run.
    own_loss: name of its loss, '' for the model's own.
    arrays: names of those that it would go on with.
    step: the folder.

  Raises:
    CannotResume: this run is another one.
  """
  changed = _check_same_run(run['config'], config, step)
  changed |= _check_same_loss(run.get('own_loss'), own_loss, step)
  if len(run['data']) != jax.process_count():
    raise CannotResume(
      f'{step} was saved by {len(run["data"])} processes and cannot be '
      f'resumed by {jax.process_count()}: each has its own place in the '
      'data',
      step,
    )
  recorded = run.get('arrays')
  for name in arrays:
    if recorded is not None and name not in recorded:
      raise CannotResume(
        f'{step} has no array {name}: it was trained by another optimizer',
        step,
      )
  return changed


def _check_same_run(old: dict[str, Any], new: RunConfig, step: Path) -> Changes:
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


def _check_same_loss(old: str | None, new: str, step: Path) -> Changes:
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
