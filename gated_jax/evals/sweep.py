"""Many runs on the devices of one machine, one on each at a time.

    python -m gated_jax.evals.sweep configs/evidence.py:sinks --devices=4 \
      --budget=25m --runs=runs/evidence
    JAX_PLATFORMS=cpu python -m gated_jax.evals.sweep \
      configs/evidence.py:sinks,small --devices=2

Each run is `train.py` in a process of its own that sees one device (on CPUs:
its share of the cores), with a folder of its own under --runs. A run whose
metrics reach its last step is done and is left alone; one that was cut resumes
from its checkpoint. When the budget is spent, runs save and stop, and the same
command goes on with them. --runs may lie in a bucket, too. Flags after `--` are
given to every run: `-- --config.data.paths='runs/text/*.npy'`.

A config file may define `runs(words)`, the words of every run that its words
stand for, and `about(words)`, what a report wants to know of one run; see
`configs/evidence.py`. Read `report.py` for what is made of the folders.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from gated_jax import cli
from gated_jax import paths
from gated_jax.evals import metric_files
from gated_jax.evals.records import DIVERGED
from gated_jax.evals.records import last_line
from gated_jax.evals.run_log import RunLog
from gated_jax.paths import Path

# Seconds that a stopped run has to save its checkpoint.
SAVING = 90
# Seconds between two lines of progress.
PROGRESS = 20


@dataclasses.dataclass(frozen=True)
class Run:
  """One configuration and its folder."""

  config: str  # FILE:WORDS
  folder: Path
  steps: int
  about: dict[str, Any]

  @property
  def name(self) -> str:
    """The run's folder, which names it."""
    return self.folder.name

  def outcome(self) -> str:
    """'done', 'diverged', or '' where there is something left to do."""
    if DIVERGED in last_line(self.folder / 'log.txt'):
      return 'diverged'
    for record in reversed(metric_files.read(self.folder / 'metrics.jsonl')):
      if record['step'] == self.steps and 'validation/loss' in record:
        return 'done'
    return ''

  def progress(self) -> str:
    """Step, loss and speed in a few words."""
    records = metric_files.read(self.folder / 'metrics.jsonl')
    losses = [r for r in records if r.get('loss') is not None]
    if not losses:
      return f'{self.name} starting'
    last = losses[-1]
    speed = last.get('tokens_per_second') or 0.0
    return (
      f'{self.name} {last["step"]:,}/{self.steps:,} loss {last["loss"]:.3f} '
      f'{speed / 1e3:,.0f}k tokens/s'
    )


def expand(config: str, folder: Path) -> list[Run]:
  """The runs that FILE:WORDS stands for."""
  path, _, words = config.partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(f'there is no config file {path!r}')
  module = runpy.run_path(path)
  if 'get_config' not in module:
    raise ValueError(f'{path!r} has no get_config')
  all_words = module['runs'](words) if 'runs' in module else [words]
  runs = []
  for one in all_words:
    name = (one or pathlib.Path(path).stem).replace(',', '_')
    about = module['about'](one) if 'about' in module else {}
    settings = module['get_config'](one) if one else module['get_config']()
    model, data = settings.model, settings.data
    about |= {
      'tokens_per_step': data.batch * data.length,
      'steps': settings.steps,
      'depth': model.depth,
      'length': data.length,
      'learning_rate': settings.optimizer.learning_rate,
    }
    whole = f'{path}:{one}' if one else path
    runs.append(Run(whole, folder / name, settings.steps, about))
  return runs


def environment(device: int, devices: int) -> dict[str, str]:
  """Variables under which a process sees one device of its machine."""
  given = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
  gpus = [name for name in given if name] or [str(i) for i in range(devices)]
  if device >= len(gpus):
    raise ValueError(
      f'--devices={devices} is more than the {len(gpus)} GPUs of '
      f'CUDA_VISIBLE_DEVICES={",".join(gpus)}'
    )
  return {
    **os.environ,
    'CUDA_VISIBLE_DEVICES': gpus[device],
    'TPU_VISIBLE_CHIPS': str(device),
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
    'PYTHONUNBUFFERED': '1',
  }


def cores(device: int, devices: int) -> set[int]:
  """The CPU cores of one process out of several, at least one."""
  every = sorted(os.sched_getaffinity(0))
  return set(every[device::devices]) or {every[device % len(every)]}


class Worker:
  """A device, and the run that is on it."""

  def __init__(self, device: int, devices: int, flags: Sequence[str]):
    self.run: Run | None = None
    self._device, self._devices = device, devices
    self._flags = list(flags)
    self._process: subprocess.Popen[bytes] | None = None
    self._log: RunLog | None = None

  def start(self, run: Run) -> None:
    """Begins the run, or goes on with it."""
    if not paths.in_bucket(run.folder):
      run.folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps({'config': run.config, **run.about}, indent=1)
    paths.write_bytes(run.folder / 'run.json', f'{about}\n'.encode())
    command = [
      sys.executable,
      'train.py',
      f'--config={run.config}',
      f'--workdir={run.folder}',
      *self._flags,
    ]
    self._log = RunLog(run.folder / 'log.txt')
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=self._log.file,
      stderr=self._log.file,
      env=environment(self._device, self._devices),
      start_new_session=True,  # Ctrl-C goes to us, who stop it in order
    )
    # Accelerators leave the cores to whoever needs them.
    cpu = os.environ.get('JAX_PLATFORMS', '').startswith('cpu')
    if cpu and hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(process.pid, cores(self._device, self._devices))
    self.run, self._process = run, process

  def finished(self) -> bool:
    """Tells whether a run has ended since this was last asked."""
    if self._process is None or self._process.poll() is None:
      return False
    self._ended()
    return True

  def _ended(self) -> None:
    self._process = None
    if self._log is not None:
      self._log.close()
      self._log = None

  def save_log(self) -> None:
    """Brings what the run has printed so far to where it is to be read."""
    if self._log is not None:
      self._log.save()

  @property
  def busy(self) -> bool:
    """Tells whether a run is being trained here."""
    return self._process is not None

  def stop(self) -> None:
    """Asks the run to save and end."""
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)

  def wait(self, seconds: float) -> None:
    """Waits for the end of a run that was asked to stop, then ends it."""
    if self._process is None:
      return
    try:
      self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._ended()


def sweep(
  runs: Sequence[Run], devices: int, seconds: float, flags: Sequence[str]
) -> bool:
  """Works through the runs; whether all of them came to an end."""
  end = time.monotonic() + seconds
  waiting = []
  for run in runs:
    outcome = run.outcome()
    if outcome:
      _say(f'{run.name}: {outcome} before')
    else:
      waiting.append(run)
  workers = [Worker(i, devices, flags) for i in range(devices)]
  heard = time.monotonic()
  try:
    while time.monotonic() < end:
      for worker in workers:
        if worker.finished():
          _say_end(worker.run)
        if not worker.busy and waiting:
          worker.start(waiting.pop(0))
      active = [w.run for w in workers if w.busy and w.run is not None]
      if not active:
        break
      if time.monotonic() - heard > PROGRESS:
        heard = time.monotonic()
        for worker in workers:
          worker.save_log()
        _say(' | '.join(run.progress() for run in active))
      time.sleep(0.5)
  finally:  # the budget, Ctrl-C, or an error of ours
    for worker in workers:
      worker.stop()
    deadline = time.monotonic() + SAVING
    for worker in workers:
      worker.wait(max(0.0, deadline - time.monotonic()))
  return all(run.outcome() for run in runs)


def _say_end(run: Run | None) -> None:
  if run is None:
    return
  outcome = run.outcome()
  if outcome:
    _say(f'{run.name}: {outcome}')
  else:
    log = run.folder / 'log.txt'
    _say(f'{run.name}: failed, see {log}: {last_line(log)}')


def _say(text: str) -> None:
  print(time.strftime('%H:%M:%S'), text, flush=True)


def table(runs: Sequence[Run]) -> str:
  """One line a run: how far it is, and its last figures."""
  columns = ('validation/loss', 'sink/mean', 'activation/max')
  width = max(len(run.name) for run in runs)
  head = ' '.join(f'{name:>15}' for name in columns)
  lines = [f'{"run":<{width}} {"step":>8} {head}']
  for run in runs:
    last: dict[str, float] = {'step': 0}
    for record in metric_files.read(run.folder / 'metrics.jsonl'):
      last.update({k: v for k, v in record.items() if v is not None})
    values = ' '.join(f'{last.get(n, math.nan):>15.4f}' for n in columns)
    outcome = run.outcome() or 'cut'
    lines.append(f'{run.name:<{width}} {last["step"]:>8} {values} {outcome}')
  return '\n'.join(lines)


def duration(text: str) -> float:
  """Seconds of '90', '90s', '25m' or '2h'."""
  unit = {'s': 1, 'm': 60, 'h': 3600}.get(text[-1:], 0)
  try:
    seconds = float(text[:-1]) * unit if unit else float(text)
  except ValueError:
    seconds = math.nan
  if not (math.isfinite(seconds) and seconds > 0):
    raise ValueError(f'--budget={text!r} must be a time such as 90s, 25m or 2h')
  return seconds


def main(argv: Sequence[str]) -> int:
  """The command; cli.UNFINISHED where the budget did not reach to the end."""
  own = list(argv)
  flags: list[str] = []
  if '--' in own:
    place = own.index('--')
    own, flags = own[:place], own[place + 1 :]
  parser = cli.Parser(
    prog='python -m gated_jax.evals.sweep',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('configs', nargs='+', metavar='FILE:WORDS')
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--budget', default='1000h', help='90s, 25m, 2h')
  parser.add_argument('--runs', default='runs/evidence')
  parser.add_argument('--list', action='store_true', help='only name the runs')
  options = parser.parse_args(own)
  if options.devices < 1:
    raise ValueError(f'--devices={options.devices} must be at least 1')
  seconds = duration(options.budget)
  folder = paths.expand(options.runs)
  paths.check_bucket(folder)
  # One that is named twice runs once, where it is named first.
  named = [run for text in options.configs for run in expand(text, folder)]
  runs = list({run.folder: run for run in named}.values())
  if options.list:
    print('\n'.join(run.config for run in runs))
    return cli.DONE
  # A terminated sweep stops its runs in order, as one that is interrupted.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  done = sweep(runs, options.devices, seconds, flags)
  print(table(runs))
  return cli.DONE if done else cli.UNFINISHED


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
