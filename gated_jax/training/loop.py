"""A run from its settings to its report: build, resume, train, sum up.

    config -> build (mesh, model, optimizer, data) -> restore -> compile
      -> steps, each of them dispatched without waiting for the one before
      -> final evaluation, checkpoint, figures and report

Read `gated_jax/training/step.py` for what one step computes, `checkpoint.py`
for what is kept and `report.py` for what is said at the end.
"""

import collections
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.experimental import multihost_utils

from gated_jax import sharding
from gated_jax.config import RunConfig
from gated_jax.data.pipeline import Pipeline
from gated_jax.data.pipeline import make_pipeline
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.decoder import Decoder
from gated_jax.training import report
from gated_jax.training.checkpoint import Checkpoints
from gated_jax.training.checkpoint import load_parameters
from gated_jax.training.console import Console
from gated_jax.training.console import StopRequest
from gated_jax.training.console import stop_on_signal
from gated_jax.training.evaluation import Evaluation
from gated_jax.training.evaluation import Validation
from gated_jax.training.evaluation import target_bytes
from gated_jax.training.metrics import Clock
from gated_jax.training.metrics import Metrics
from gated_jax.training.metrics import utilisation
from gated_jax.training.optimizer import make_optimizer
from gated_jax.training.optimizer import make_schedule
from gated_jax.training.step import TrainState
from gated_jax.training.step import make_init
from gated_jax.training.step import make_step
from gated_jax.training.step import state_shardings

# Steps dispatched ahead of the one whose metrics the host has seen: enough to
# keep the device busy, few enough to notice trouble at once.
IN_FLIGHT = 2

Tree = Any


class RunStopped(RuntimeError):
  """The run cannot go on; what was saved is good."""


@dataclasses.dataclass
class Parts:
  """What a run is made of. Only `state` changes."""

  config: RunConfig
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  model: Decoder
  abstract: TrainState
  state: TrainState
  step: Any
  data: Pipeline
  evaluation: Evaluation
  checkpoints: Checkpoints
  metrics: Metrics
  console: Console
  clock: Clock


def check_workdir(workdir: pathlib.Path) -> None:
  """ValueError where nothing can be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise ValueError(
      f'cannot write to workdir {workdir}: {error.strerror or error}'
    ) from None


def rows_of_process(
  where: jax.sharding.Sharding, batch: int, length: int
) -> tuple[int, int]:
  """Which of how many equal parts of a batch this process has to read.

  Processes that hold the same rows (they share a tensor axis, say) get the
  same answer.
  """
  own = where.addressable_devices_indices_map((batch, length)).values()
  spans = [index[0].indices(batch)[:2] for index in own]
  first, last = min(s[0] for s in spans), max(s[1] for s in spans)
  rows = last - first
  if batch % rows or first % rows:
    raise ValueError(
      f'this process holds rows {first} to {last} of data.batch={batch}, '
      'which is no equal share: choose another mesh'
    )
  return first // rows, batch // rows


def to_devices(
  batch: dict[str, np.ndarray],
  where: jax.sharding.Sharding,
  part: int,
  parts: int,
) -> dict[str, jax.Array]:
  """Global arrays of which this process provides its rows."""

  def place(rows: np.ndarray) -> jax.Array:
    first = part * len(rows)
    shape = (len(rows) * parts, *rows.shape[1:])

    def shard(index):
      begin, end, _ = index[0].indices(shape[0])
      return rows[(slice(begin - first, end - first), *index[1:])]

    return jax.make_array_from_callback(shape, where, shard)

  return {name: place(rows) for name, rows in batch.items()}


def build(config: RunConfig, workdir: pathlib.Path, console: Console) -> Parts:
  """Everything a run needs, restored from its newest checkpoint if any."""
  check_workdir(workdir)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  clock = Clock()
  rows = sharding.batch_sharding(mesh)
  part, parts = rows_of_process(rows, config.data.batch, config.data.length)
  reading = {'shard': part, 'shards': parts, 'vocab': config.model.vocab}
  data = make_pipeline(config.data, 'train', **reading)
  data.start()

  model = Decoder(config.model)
  with sharding.activate(mesh):
    abstract, init, step = _functions(config, model, mesh)
    checkpoints = Checkpoints(workdir / 'checkpoints', config, say=console.say)
    found = checkpoints.restore(abstract)
    if found is None:
      state = init(jax.random.key(config.seed))
      if config.init_from:
        params = load_parameters(config.init_from, abstract.params)
        state = state.replace(params=params)
    else:
      state, position, changed = found
      data.restore(position.encode())
      console.say(f'resuming after step {int(state.step)}')
      for name, (old, new) in changed.items():
        console.say(f'changed since: {name} {old!r} -> {new!r}')

  evaluation = _evaluation(config, model, rows, reading)
  return Parts(
    config=config,
    workdir=workdir,
    mesh=mesh,
    model=model,
    abstract=abstract,
    state=state,
    step=step,
    data=data,
    evaluation=evaluation,
    checkpoints=checkpoints,
    metrics=Metrics(workdir, config, after=int(state.step)),
    console=console,
    clock=clock,
  )


def _functions(
  config: RunConfig, model: Decoder, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any, Any]:
  """The state's shapes and places; init and step, jitted for them."""
  key = jax.random.key(config.seed)
  length = config.data.length
  boxed = jax.eval_shape(model.init, key, jnp.zeros((1, length), jnp.int32))
  optimizer = make_optimizer(
    config.optimizer, config.steps, meta.unbox(boxed['params'])
  )
  init = make_init(model, optimizer, length)
  shapes = jax.eval_shape(init, key)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  places = state_shardings(
    shapes, sharding.shardings(mesh, boxed['params']), everywhere
  )
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )
  step = make_step(
    model,
    optimizer,
    make_schedule(config.optimizer, config.steps),
    config.optimizer,
  )
  return (
    abstract,
    jax.jit(init, out_shardings=places),
    jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)),
  )


def _evaluation(
  config: RunConfig, model: Decoder, rows: Any, reading: dict[str, int]
) -> Evaluation:
  """Reads the held-out batches, once."""
  if not config.data.validation:
    return Evaluation(model, [], 0.0)
  with make_pipeline(config.data, 'validation', **reading) as pipeline:
    batches = [
      batch
      for batch, _ in zip(pipeline, range(config.eval_batches), strict=False)
    ]
    known = target_bytes(batches, pipeline.tokenizer.byte_lengths())
  if reading['shards'] > 1:
    sums = np.asarray(multihost_utils.process_allgather(np.float64(known)))
    known = float(sums.sum()) * reading['shards'] / jax.process_count()
  placed = [
    to_devices(batch, rows, reading['shard'], reading['shards'])
    for batch in batches
  ]
  return Evaluation(model, placed, known)


class Loop:
  """The steps of a run, dispatched ahead of what the host has seen."""

  def __init__(self, parts: Parts):
    self.parts = parts
    self.first = self.done = int(parts.state.step)
    self.validation = Validation()
    self.report: Any = None
    self._pending: collections.deque[Any] = collections.deque()
    self._waited = parts.data.wait_seconds
    self._lap_step = self.first
    self._tokens = parts.config.data.batch * parts.config.data.length
    self._flops = sum(
      flops_per_token(parts.config.model, parts.config.data.length).values()
    )
    self._trained = 0.0  # seconds of steps alone
    self._profiling = False
    self._rows = sharding.batch_sharding(parts.mesh)
    self._share = rows_of_process(
      self._rows, parts.config.data.batch, parts.config.data.length
    )

  @property
  def tokens_per_second(self) -> float:
    """Over this run's steps, without evaluations, saves and compilation."""
    steps = self._lap_step - self.first
    return steps * self._tokens / self._trained if self._trained else 0.0

  def run(self, request: StopRequest) -> bool:
    """Trains to the end, or until asked to stop; says which."""
    parts, config = self.parts, self.parts.config
    step = self._compile() if self.done < config.steps else None
    parts.clock.lap()
    while self.done < config.steps:
      if self._should_stop(request):
        self._save()
        parts.checkpoints.wait()
        return False
      self._profile()
      batch = to_devices(next(parts.data), self._rows, *self._share)
      parts.state, metrics = step(parts.state, batch)
      self.done += 1
      self._after_step(metrics)
    self._drain()
    self._stop_profile()
    return True

  def _compile(self) -> Any:
    """The step for exactly these shapes; the batch it saw is not lost."""
    parts = self.parts
    shape = (parts.config.data.batch, parts.config.data.length)
    batch = {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)
      for name, dtype in (
        ('tokens', jnp.int32),
        ('targets', jnp.int32),
        ('segments', jnp.int32),
        ('positions', jnp.int32),
        ('weights', jnp.float32),
      )
    }
    start = time.perf_counter()
    step = parts.step.lower(parts.abstract, batch).compile()
    seconds = time.perf_counter() - start
    parts.clock.add('compile', seconds)
    parts.console.say(f'compiled the step in {seconds:.1f} s')
    return step

  def _should_stop(self, request: StopRequest) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self.done)
    return bool(request)

  def _after_step(self, metrics: dict[str, jax.Array]) -> None:
    parts, config = self.parts, self.parts.config
    for value in metrics.values():
      value.copy_to_host_async()
    last = self.done == config.steps
    log = last or self.done % config.log_every == 0
    rates = self._rates() if log else {}
    self._pending.append((self.done, metrics, rates))
    parts.console.advance()
    while len(self._pending) > IN_FLIGHT:
      self._look()

    def due(every: int) -> bool:
      return last or bool(every and self.done % every == 0)

    if due(config.eval_every):
      self._validate()
    if due(config.probe_every):
      self._probe()
    if due(config.checkpoint.every):
      self._save()

  def _rates(self) -> dict[str, float]:
    """Speed since the last logged step, and where its time went."""
    parts = self.parts
    seconds, spent = parts.clock.lap()
    waited = parts.data.wait_seconds - self._waited
    self._waited = parts.data.wait_seconds
    parts.clock.add('data', waited)
    parts.clock.lap()
    steps, self._lap_step = self.done - self._lap_step, self.done
    training = max(seconds - sum(spent.values()), 1e-9)
    self._trained += training
    speed = steps * self._tokens / training
    device = jax.devices()[0].device_kind
    mfu = utilisation(self._flops, speed, device, jax.device_count())
    total = parts.clock.seconds
    return {
      'tokens_per_second': speed,
      **({'mfu': mfu} if mfu else {}),
      'time/data': waited / max(seconds, 1e-9),
      **{
        f'time/{name}': parts.clock.total.get(name, 0.0) / total
        for name in ('compile', 'checkpoint', 'evaluation')
      },
    }

  def _look(self) -> None:
    """Takes in the oldest step whose metrics the host has not seen."""
    parts, config = self.parts, self.parts.config
    step, metrics, rates = self._pending.popleft()
    bad = int(metrics['bad_in_row'])
    if bad:
      parts.console.say(
        f'step {step}: loss {float(metrics["loss"])}, gradient norm '
        f'{float(metrics["grad_norm"])}: update skipped'
      )
    if bad >= config.max_bad_steps:
      raise RunStopped(
        f'loss or gradient was not finite in {bad} steps in a row, '
        f'{step - bad + 1} to {step}; {self._last_good()}'
      )
    if rates:
      values = {name: np.asarray(x).item() for name, x in metrics.items()}
      parts.metrics.write(step, values | rates)
      parts.console.show(step, config.steps, values | rates)

  def _last_good(self) -> str:
    self.parts.checkpoints.wait()
    steps = self.parts.checkpoints.steps
    if not steps:
      return 'there is no checkpoint yet'
    path = self.parts.checkpoints.path(steps[-1])
    return f'the last good checkpoint is {path}'

  def _drain(self) -> None:
    while self._pending:
      self._look()

  def _validate(self) -> None:
    parts = self.parts
    self._drain()
    with parts.clock.spent('evaluation'), sharding.activate(parts.mesh):
      self.validation = parts.evaluation.validate(parts.state.params)
    found = self.validation.scalars()
    self._validated = self.done
    if found:
      parts.metrics.write(self.done, found)
      text = '  '.join(f'{name} {value:.4f}' for name, value in found.items())
      parts.console.say(f'step {self.done}/{parts.config.steps}  {text}')

  def _probe(self) -> None:
    parts = self.parts
    self._drain()
    with parts.clock.spent('evaluation'), sharding.activate(parts.mesh):
      self.report = parts.evaluation.probe(parts.state.params)
    if self.report is not None:
      parts.metrics.write(self.done, self.report.scalars())

  def _save(self) -> None:
    parts = self.parts
    self._drain()
    fresh = getattr(self, '_validated', -1) == self.done
    with parts.clock.spent('checkpoint'):
      parts.checkpoints.save(
        parts.state,
        parts.data.state().decode(),
        self.validation.nats if fresh else float('inf'),
      )

  def _profile(self) -> None:
    config = self.parts.config
    if not config.profile_steps:
      return
    if self.done == config.profile_start:
      self._drain()
      jax.profiler.start_trace(str(self.parts.workdir / 'profile'))
      self._profiling = True
    elif self.done == config.profile_start + config.profile_steps:
      self._stop_profile()

  def _stop_profile(self) -> None:
    if self._profiling:
      jax.block_until_ready(self.parts.state)
      jax.profiler.stop_trace()
      self._profiling = False
      self.parts.console.say(f'profile in {self.parts.workdir / "profile"}')

  def finish(self) -> None:
    """What a resumed, already finished run still lacks."""
    if np.isnan(self.validation.nats):
      self._validate()
    if self.report is None:
      self._probe()
    self._save()
    with self.parts.clock.spent('checkpoint'):
      self.parts.checkpoints.wait()


def run(config: RunConfig, workdir: pathlib.Path, command: str = '') -> None:
  """Trains, or goes on training, and prints the report.

  Args:
    config: All settings.
    workdir: Where checkpoints, metrics and figures go.
    command: What the user typed, to be shown for resuming.

  Raises:
    ValueError: Something the user has to change.
    RunStopped: Too many steps in a row were not finite.
    CheckpointError: A checkpoint could not be written.
  """
  console = Console()
  parts = build(config, workdir, console)
  console.say(report.opening(config, parts.state.params, workdir))
  loop = Loop(parts)
  try:
    with stop_on_signal() as request, sharding.activate(parts.mesh):
      console.start(loop.done, config.steps)
      finished = loop.run(request)
      if finished:
        loop.finish()
    console.stop()
    if finished:
      report.closing(loop, command)
    else:
      console.say(
        f'{request.name or "asked to stop"}: saved step {loop.done} in '
        f'{parts.checkpoints.path(loop.done)}; go on with: {command}'
      )
  finally:
    console.stop()
    parts.metrics.close()
    parts.data.close()
    parts.checkpoints.close()
