"""How fast a run is and where its time goes, and a profile of some steps."""

import pathlib
import shutil
import tempfile

import jax

from gated_jax import paths
from gated_jax.training.build import RunState
from gated_jax.training.metrics import utilisation
from gated_jax.training.parts import step_flops


class Speed:
  """Tokens per second since the last logged step, and since the first.

  Args:
    run: whose clock and data are read.
    first: the step that the run begins after.
    parts: disjoint sets of rows that processes read.
  """

  def __init__(self, run: RunState, first: int, parts: int):
    data = run.config.data
    self._run = run
    self._first = self._step = first
    self._parts = parts
    self._waited = run.data.wait_seconds
    self._tokens = data.batch * data.length
    self._flops = sum(step_flops(run.config).values())
    self._trained = 0.0  # seconds of steps alone
    self._compared = False

  @property
  def tokens_per_second(self) -> float:
    """Over this run's steps, without evaluations, saves and compilation."""
    steps = self._step - self._first
    return steps * self._tokens / self._trained if self._trained else 0.0

  def since_last(self, step: int) -> dict[str, float]:
    """Figures of the steps since the last call, and what they waited for."""
    run = self._run
    seconds, spent = run.clock.lap()
    waited = run.data.wait_seconds - self._waited
    self._waited = run.data.wait_seconds
    run.clock.add('data', waited)
    run.clock.lap()
    steps, self._step = step - self._step, step
    training = max(seconds - sum(spent.values()), 1e-9)
    self._trained += training
    speed = steps * self._tokens / training
    self._compare_with_data(speed)
    device = jax.devices()[0].device_kind
    mfu = utilisation(self._flops, speed, device, jax.device_count())
    total = run.clock.seconds
    return {
      'tokens_per_second': speed,
      **({'mfu': mfu} if mfu else {}),
      **({'padding': run.data.padding} if run.data.padding else {}),
      'time/data': waited / max(seconds, 1e-9),
      **{
        f'time/{name}': run.clock.total.get(name, 0.0) / total
        for name in ('compile', 'checkpoint', 'evaluation')
      },
    }

  def _compare_with_data(self, speed: float) -> None:
    """Says, once, where reading is hardly faster than training, or slower."""
    reading = self._run.data.tokens_per_second * self._parts
    if not self._compared and 0 < reading < 2 * speed:
      self._run.console.say(
        f'data comes at {reading:,.0f} tokens/s where nothing waits for it, '
        f'steps take {speed:,.0f}: docs/data.md says what makes it faster'
      )
    self._compared = True


class Profile:
  """A trace of the steps that the config asks for, if any."""

  def __init__(self, run: RunState):
    self._run = run
    self._folder = self._written = run.workdir / 'profile'
    self._running = False

  def is_due(self, done: int) -> bool:
    """Tells whether the trace begins with the step after this one."""
    config = self._run.config
    return bool(config.profile_steps) and done == config.profile_start

  def start(self) -> None:
    """Begins the trace; steps before it should be over."""
    # The profiler writes to disks alone.
    in_bucket = paths.in_bucket(self._folder)
    self._written = (
      pathlib.Path(tempfile.mkdtemp()) if in_bucket else self._folder
    )
    jax.profiler.start_trace(str(self._written))
    self._running = True

  def stop(self, done: int | None = None) -> None:
    """Ends the trace after its last step, or wherever it is."""
    config = self._run.config
    last = config.profile_start + config.profile_steps
    if self._running and done in (None, last):
      jax.block_until_ready(self._run.state)
      jax.profiler.stop_trace()
      self._running = False
      if self._written != self._folder:
        self._bring_to_bucket()
      self._run.console.say(f'profile in {self._folder}')

  def _bring_to_bucket(self) -> None:
    """Copies the files of the trace to the workdir, and removes them here."""
    for path in paths.files_below(self._written):
      name = str(path.relative_to(self._written))
      paths.write_bytes(self._folder / name, paths.read_bytes(path))
    shutil.rmtree(self._written)
