"""Writes a run's numbers: JSON lines first, then whoever else was asked for.

`metrics.jsonl` is the record: one object a line, with `step` and whatever was
measured there; `lines.py` says where they lie. A run that resumes drops the
lines after the step it resumes from, so that no step stands there twice.
TensorBoard and Weights & Biases get the same numbers.
"""

import contextlib
import json
import math
import tempfile
import time
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax

from gated_jax import chips
from gated_jax import paths
from gated_jax.config import RunConfig
from gated_jax.config import to_dict
from gated_jax.evals import metric_files
from gated_jax.paths import Path
from gated_jax.training.lines import BucketLines
from gated_jax.training.lines import FileLines
from gated_jax.training.lines import lines_at
from gated_jax.training.tensorboard import TensorBoard


def utilisation(
  flops_per_token: float, tokens_per_second: float, kind: str, devices: int
) -> float:
  """Model FLOPs done over those possible; 0 where the peak is not known."""
  chip = chips.find(kind)
  if chip is None:
    return 0.0
  return flops_per_token * tokens_per_second / (chip.peak_flops * devices)


class Clock:
  """Counts wall time by name; what no name covers is the training.

  `lap` is the time since the last one; `total` since the run began.
  """

  def __init__(self):
    self._start = self._lap_start = time.perf_counter()
    self._lap: dict[str, float] = {}
    self.total: dict[str, float] = {}

  def add(self, name: str, seconds: float) -> None:
    """Adds seconds under a name."""
    for sums in (self._lap, self.total):
      sums[name] = sums.get(name, 0.0) + seconds

  @contextlib.contextmanager
  def spent(self, name: str) -> Iterator[None]:
    """Counts the time that the block takes under a name."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.add(name, time.perf_counter() - start)

  def lap(self) -> tuple[float, dict[str, float]]:
    """Seconds since the last lap, and those of them under each name."""
    now = time.perf_counter()
    seconds, spent = now - self._lap_start, self._lap
    self._lap_start, self._lap = now, {}
    return seconds, spent

  @property
  def seconds(self) -> float:
    """Seconds since the lap began."""
    return time.perf_counter() - self._start


def _plain(value: Any) -> Any:
  """JSON has no NaN; a number that is none is written as null."""
  number = value if isinstance(value, int) else float(value)
  return number if math.isfinite(number) else None


class Metrics:
  """Writes scalars on process 0; on the others it does nothing.

  Args:
    workdir: Where metrics.jsonl and TensorBoard's files go.
    config: Says who else wants the numbers.
    after: Lines up to and including this step are kept.
  """

  def __init__(self, workdir: Path, config: RunConfig, after: int):
    self.path = workdir / metric_files.NAME
    self._lines: FileLines | BucketLines | None = None
    self._tensorboard: TensorBoard | None = None
    self._wandb: Any = None
    self._after, self._written = after, frozenset[str]()
    if jax.process_index():
      return
    self._lines = lines_at(self.path, after)
    last = [record for record in self._lines.kept if record['step'] == after]
    self._written = frozenset().union(*last)
    if config.tensorboard:
      self._tensorboard = TensorBoard(workdir / 'tensorboard', after)
    if config.wandb:
      self._wandb = _wandb(workdir, config)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes what was measured at a step.

    What an earlier start of the run wrote at the step that this one resumed
    from is not written again: a finished run measures it anew when started.
    """
    if self._lines is None:
      return
    if step == self._after:
      values = {k: x for k, x in values.items() if k not in self._written}
    if not values:
      return
    plain = {name: _plain(value) for name, value in values.items()}
    with self._writing():
      self._lines.add(json.dumps({'step': step, **plain}) + '\n')
    if self._tensorboard is not None:
      self._tensorboard.write(step, plain)
    if self._wandb is not None:
      self._wandb.log(plain, step=step)

  def save(self) -> None:
    """Brings all that was written to where it outlives this process."""
    if self._lines is not None:
      with self._writing():
        self._lines.save()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Inside, an OSError says which file could not be written."""
    try:
      yield
    except OSError as error:
      reason = error.strerror or error
      raise OSError(f'cannot write {self.path}: {reason}') from error

  def close(self) -> None:
    """Lets go of all files; what a full disk did not take is dropped."""
    if self._lines is not None:
      self._lines.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()


def _wandb(workdir: Path, config: RunConfig) -> Any:
  try:
    import wandb
  except ImportError:
    raise ValueError(
      f'wandb={config.wandb!r} needs a package: pip install wandb'
    ) from None
  # The file makes a run that resumes go on there as well.
  identity = workdir / 'wandb_id'
  if not paths.exists(identity):
    paths.write_bytes(identity, uuid.uuid4().hex.encode())
  in_bucket = paths.in_bucket(workdir)
  try:
    return wandb.init(
      project=config.wandb,
      name=paths.absolute(workdir).name,
      dir=tempfile.mkdtemp() if in_bucket else str(workdir),
      config=to_dict(config),
      id=paths.read_bytes(identity).decode().strip(),
      resume='allow',
    )
  except Exception as error:  # its own kinds, of which there are many
    text = ' '.join(str(error).split())
    raise ValueError(f'wandb={config.wandb!r}: {text}') from error
