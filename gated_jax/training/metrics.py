"""Writes a run's numbers: JSON lines first, then whoever else was asked for.

`metrics.jsonl` is the record: one object a line, with `step` and whatever was
measured there. A run that resumes drops the lines after the step it resumes
from, so that no step stands there twice. TensorBoard and Weights & Biases get
the same numbers.
"""

import contextlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import TextIO

import jax

from gated_jax import chips
from gated_jax.config import RunConfig
from gated_jax.config import to_dict
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

  def __init__(self, workdir: pathlib.Path, config: RunConfig, after: int):
    self.path = workdir / 'metrics.jsonl'
    self._file: TextIO | None = None
    self._tensorboard: TensorBoard | None = None
    self._wandb: Any = None
    self._after, self._written = after, frozenset[str]()
    if jax.process_index():
      return
    self._written = self._keep_until(after)
    self._file = self.path.open('a', encoding='utf-8')
    if config.tensorboard:
      self._tensorboard = TensorBoard(workdir / 'tensorboard', after)
    if config.wandb:
      self._wandb = _wandb(workdir, config)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes what was measured at a step.

    What an earlier start of the run wrote at the step that this one resumed
    from is not written again: a finished run measures it anew when started.
    """
    if self._file is None:
      return
    if step == self._after:
      values = {k: x for k, x in values.items() if k not in self._written}
    if not values:
      return
    plain = {name: _plain(value) for name, value in values.items()}
    try:
      self._file.write(json.dumps({'step': step, **plain}) + '\n')
      self._file.flush()
    except OSError as error:
      raise OSError(f'cannot write {self.path}: {error.strerror}') from error
    if self._tensorboard is not None:
      self._tensorboard.write(step, plain)
    if self._wandb is not None:
      self._wandb.log(plain, step=step)

  def close(self) -> None:
    """Lets go of all files; what a full disk did not take is dropped."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()

  def _keep_until(self, step: int) -> frozenset[str]:
    """Drops later lines, and one that a kill cut short.

    Returns:
      What was measured at `step` itself.
    """
    if not self.path.exists():
      return frozenset()
    records = [record for record in read(self.path) if record['step'] <= step]
    new = self.path.with_suffix('.jsonl.new')
    lines = [json.dumps(record) + '\n' for record in records]
    new.write_text(''.join(lines), encoding='utf-8')
    os.replace(new, self.path)
    last = [record for record in records if record['step'] == step]
    return frozenset().union(*last)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl, in order, without what is no record."""
  records = []
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      record = json.loads(line)
      if isinstance(record, dict) and isinstance(record.get('step'), int):
        records.append(record)
  return records


def _wandb(workdir: pathlib.Path, config: RunConfig) -> Any:
  try:
    import wandb
  except ImportError:
    raise ValueError(
      f'wandb={config.wandb!r} needs a package: pip install wandb'
    ) from None
  # The file makes a run that resumes go on there as well.
  identity = workdir / 'wandb_id'
  if not identity.exists():
    identity.write_text(uuid.uuid4().hex, encoding='utf-8')
  try:
    return wandb.init(
      project=config.wandb,
      name=workdir.absolute().name,
      dir=str(workdir),
      config=to_dict(config),
      id=identity.read_text(encoding='utf-8').strip(),
      resume='allow',
    )
  except Exception as error:  # its own kinds, of which there are many
    text = ' '.join(str(error).split())
    raise ValueError(f'wandb={config.wandb!r}: {text}') from error
