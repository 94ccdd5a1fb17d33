"""The steps of a run that stay, because their held-out loss is low."""

import json
import math
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.checkpoint.folder import CheckpointError
from gated_jax.checkpoint.folder import read_run
from gated_jax.paths import Path


def loss_of(step: Path) -> float:
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


class BestSteps(checkpoint_managers.PreservationPolicy):
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
