"""Runs as they lie on disk, and as a few numbers of each in one small file.

A run's folder holds `metrics.jsonl` (a record a line), `run.json` (what the
sweep knew of it) and `probe.json` (the last look inside, by layer and head).
`pack` keeps what tables and figures need of many runs, small enough to stand
in a repository.
"""

import dataclasses
import gzip
import json
import math
import os
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import numpy as np

from gated_jax import paths
from gated_jax.evals import metric_files
from gated_jax.paths import Path

# Points that are kept of a curve logged more often.
POINTS = 100
# Metrics kept over training: numbers, and lists by layer under a shorter name.
_OVER_TRAINING = ('step', 'validation/loss', 'attention_logit/max', 'gate/mean')
_BY_LAYER = {'sink/layer_': 'sink', 'activation/layer_': 'activation'}
# What tables and figures read of the last look inside a model, and how many
# digits of it they need: heads are counted by whether they exceed a bound.
_DRAWN = {
  'first_token': 4,
  'near_first_token': 4,
  'activation': 3,
  'attention_logit': 3,
  'gate_mean': 3,
  'gate_histogram': 2,
}
# A loss is a spike where it lies so many nats above the running median, and so
# many times as far as losses around it usually do (small batches vary).
SPIKE = 0.3
DEVIATIONS = 4.0
MEDIAN_OF = 101  # losses
# train.py says this of a run whose loss is no number any more.
DIVERGED = 'was not finite'


@dataclasses.dataclass(frozen=True)
class Record:
  """One run in brief."""

  name: str
  about: dict[str, Any]  # claim, arm, seed, rate, the paper's figures
  curve: list[list[float]]  # [step, loss], each point a mean over its steps
  # Over training: step, numbers, and lists by layer (`sink`, `activation`).
  probes: list[dict[str, Any]]
  last: dict[str, float]  # newest value of every metric that no layer has
  probe: dict[str, Any]  # evals.diagnostics.Report.arrays at the end
  spikes: int
  outcome: str = 'done'  # 'cut' and 'diverged' are the others
  # [step, tokens per second], as `curve`; packed files leave it out.
  speed: list[list[float]] = dataclasses.field(default_factory=list)
  # Figures of evals.context: name of the rotation to `loss`, `retrieval`.
  context: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def arm(self) -> str:
    """Which of the compared models this run trains."""
    return str(self.about.get('arm', self.name))

  @property
  def seed(self) -> int:
    """The seed of the run."""
    return int(self.about.get('seed', 0))

  @property
  def tokens_per_step(self) -> int:
    """How many tokens a step reads."""
    return int(self.about.get('tokens_per_step', 1))

  def value(self, name: str) -> float:
    """A metric's newest value; NaN where there is none."""
    return self.last.get(name, math.nan)

  def array(self, name: str) -> np.ndarray:
    """One of the probe's arrays; what was no number is NaN."""
    return np.array(self.probe.get(name, []), float)


def read(places: Iterable[str | os.PathLike[str]]) -> list[Record]:
  """The runs of folders, of folders of folders, and of packed files.

  Raises:
    ValueError: there is no run in one of them.
  """
  records = []
  for path in map(paths.expand, places):
    if paths.is_file(path):
      records += _unpack(path)
      continue
    paths.check_bucket(path)
    folders = metric_files.runs_in(path)
    if not folders:
      raise ValueError(f'{path} holds no metrics.jsonl of a run')
    records += [_read_folder(folder) for folder in folders]
  return records


def pack(records: Sequence[Record], path: Path) -> None:
  """Writes the runs to one JSON file, a line each; compressed for `*.gz`.

  Numbers keep as many digits as tables and figures show.
  """
  lines = []
  for record in records:
    fields = dataclasses.asdict(record)
    del fields['speed']
    fields['curve'] = [[step, _digits(x, 4)] for step, x in record.curve]
    fields['probe'] = {
      name: _short(record.probe[name], digits)
      for name, digits in _DRAWN.items()
      if name in record.probe
    }
    lines.append(json.dumps(fields, separators=(',', ':')))
  path.parent.mkdir(parents=True, exist_ok=True)
  text = '[\n' + ',\n'.join(lines) + '\n]\n'
  data = text.encode()
  # Without the time: the same runs give the same file.
  zipped = path.suffix == '.gz'
  paths.write_bytes(path, gzip.compress(data, mtime=0) if zipped else data)


def _unpack(path: Path) -> list[Record]:
  try:
    data = paths.read_bytes(path)
    text = gzip.decompress(data) if path.suffix == '.gz' else data
    return [Record(**fields) for fields in json.loads(text)]
  except (ValueError, TypeError, OSError, EOFError) as error:
    raise ValueError(f'{path} is no file of packed runs: {error}') from error


def _read_folder(folder: Path) -> Record:
  metrics = metric_files.read(folder / metric_files.NAME)
  about = _json(folder / 'run.json')
  last: dict[str, float] = {}
  for record in metrics:
    last.update({name: x for name, x in record.items() if _number(x)})
  steps = [r['step'] for r in metrics if 'loss' in r]
  # A loss that is no number is written as null.
  losses = [
    r['loss'] if _number(r['loss']) else math.inf
    for r in metrics
    if 'loss' in r
  ]
  timed = [r for r in metrics if _number(r.get('tokens_per_second'))]
  whole = last.get('step') == about.get('steps', last.get('step'))
  diverged = DIVERGED in last_line(folder / 'log.txt')
  return Record(
    name=folder.name,
    about=about,
    curve=thin(steps, losses),
    probes=over_training(metrics),
    last={
      n: _digits(x)
      for n, x in last.items()
      if '/layer_' not in n and not n.startswith(('time/', 'sink/heads'))
    },
    probe=_json(folder / 'probe.json'),
    spikes=spikes(losses),
    outcome='diverged' if diverged else 'done' if whole else 'cut',
    speed=thin(
      [r['step'] for r in timed], [r['tokens_per_second'] for r in timed]
    ),
    context=_json(folder / 'context.json'),
  )


def last_line(path: Path) -> str:
  """The last line of a log that says something; '' where there is no log."""
  if not paths.is_file(path):
    return ''
  with paths.open_for_reading(path) as file:
    file.seek(max(0, paths.size(path) - 4096))
    lines = file.read().decode('utf-8', 'replace').splitlines()
  return next((line for line in reversed(lines) if line.strip()), '')


def over_training(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """A record for each step with a held-out loss or a probe, of what is kept."""
  merged: dict[int, dict[str, Any]] = {}
  for record in metrics:
    if 'sink/mean' not in record and 'validation/loss' not in record:
      continue
    point = merged.setdefault(record['step'], {})
    for name in _OVER_TRAINING:
      if _number(record.get(name)):
        point[name] = _digits(record[name])
    for prefix, short in _BY_LAYER.items():
      names = sorted(name for name in record if name.startswith(prefix))
      if names:
        point[short] = [
          _digits(record[n], 3) if _number(record[n]) else None for n in names
        ]
  return [merged[step] for step in sorted(merged)]


def thin(steps: Sequence[int], losses: Sequence[float]) -> list[list[float]]:
  """At most POINTS points, each the mean of its steps, at their last step."""
  parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)) or 1)
  points = []
  for part in parts:
    values = np.array([losses[i] for i in part])
    values = values[np.isfinite(values)]
    if len(values):
      points.append([float(steps[part[-1]]), _digits(values.mean())])
  return points


def spikes(losses: Sequence[float]) -> int:
  """How many losses lie far above the running median around them."""
  values = np.array(losses, float)
  if len(values) < MEDIAN_OF:
    return 0
  windows = np.lib.stride_tricks.sliding_window_view(values, MEDIAN_OF)
  medians = np.median(windows, axis=1, keepdims=True)
  # The median distance from the median, which in a normal distribution is
  # 0.6745 standard deviations.
  usual = np.median(np.abs(windows - medians), axis=1) / 0.6745
  middle = windows[:, MEDIAN_OF // 2] - medians[:, 0]
  return int(np.sum(middle > np.maximum(SPIKE, DEVIATIONS * usual)))


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _digits(value: float, digits: int = 5) -> float:
  """So many significant digits; whole numbers as they are."""
  return value if isinstance(value, int) else float(f'{value:.{digits}g}')


def _short(values: Any, digits: int) -> Any:
  """Nested lists of numbers, each with so many significant digits."""
  if isinstance(values, list):
    return [_short(value, digits) for value in values]
  return _digits(values, digits) if _number(values) else values


def _json(path: Path) -> dict[str, Any]:
  """The object in a file; {} where there is no file."""
  if not paths.is_file(path):
    return {}
  values = json.loads(paths.read_bytes(path))
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds no JSON object')
  return values
