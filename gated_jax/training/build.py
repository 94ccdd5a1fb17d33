"""What a run is made of, put together: mesh, model, optimizer, state, data.

A state comes from the newest checkpoint of the workdir, or fresh from the
seed. Read `gated_jax/training/loop.py` next.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.experimental import multihost_utils

from gated_jax import sharding
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import to_dict
from gated_jax.data.pipeline import Pipeline
from gated_jax.data.pipeline import make_pipeline
from gated_jax.model.decoder import Decoder
from gated_jax.training.checkpoint import Checkpoints
from gated_jax.training.checkpoint import gather
from gated_jax.training.checkpoint import load_parameters
from gated_jax.training.console import Console
from gated_jax.training.evaluation import Evaluation
from gated_jax.training.evaluation import target_bytes
from gated_jax.training.metrics import Clock
from gated_jax.training.metrics import Metrics
from gated_jax.training.optimizer import make_optimizer
from gated_jax.training.optimizer import make_schedule
from gated_jax.training.step import TrainState
from gated_jax.training.step import make_init
from gated_jax.training.step import make_step
from gated_jax.training.step import state_shardings


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


def check_same_config(config: RunConfig) -> None:
  """ValueError where another process was started with other settings."""
  configs = gather(to_dict(config))
  for process, other in enumerate(configs):
    changed = differences(configs[0], other)
    if changed:
      shown = '; '.join(f'{k}: {a!r}, {b!r}' for k, (a, b) in changed.items())
      raise ValueError(
        f'processes 0 and {process} have different settings: {shown}'
      )


def rows_of_process(
  where: jax.sharding.Sharding, batch: int, length: int
) -> tuple[int, int]:
  """Which of how many equal parts of a batch this process has to read.

  Processes that hold the same rows (they share a tensor axis, say) get the
  same answer.
  """
  own = where.addressable_devices_indices_map((batch, length)).values()
  spans = [index[0].indices(batch)[:2] for index in own if index]
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
  check_same_config(config)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  clock = Clock()
  rows = sharding.batch_sharding(mesh)
  part, parts = rows_of_process(rows, config.data.batch, config.data.length)
  reading = {'shard': part, 'shards': parts, 'vocab': config.model.vocab}
  data = make_pipeline(config.data, 'train', **reading)
  data.start()

  model = Decoder(config.model)
  with sharding.activate(mesh):
    abstract, init, step = make_functions(config, model, mesh)
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


def make_functions(
  config: RunConfig, model: Decoder, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any, Any]:
  """The state's shapes and places; init and step, jitted for them."""
  # Nothing is computed here: the mesh may be of devices that are not there.
  key = jax.eval_shape(lambda: jax.random.key(config.seed))
  length = config.data.length
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  boxed = jax.eval_shape(model.init, key, tokens)
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
