"""Puts a run together: mesh, model, optimizer, state, data.

A state comes from the newest checkpoint of the workdir, or fresh from the
seed. Read `gated_jax/training/loop.py` next.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gated_jax import chips
from gated_jax import memory
from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.config import RunConfig
from gated_jax.config import differences
from gated_jax.config import to_dict
from gated_jax.data.batch import arrays_of
from gated_jax.data.pipeline import Pipeline
from gated_jax.data.pipeline import make_pipeline
from gated_jax.evals.likelihood import target_bytes
from gated_jax.model import adapters
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.model.mixers import mixer_named
from gated_jax.model.size import check_fits
from gated_jax.ops import moe
from gated_jax.ops.attention import api as attention
from gated_jax.ops.delta import rule as delta
from gated_jax.paths import Path
from gated_jax.processes import first_problem
from gated_jax.processes import gather
from gated_jax.training.checkpoints import Checkpoints
from gated_jax.training.console import Console
from gated_jax.training.continuation import CannotResume
from gated_jax.training.custom import Callback
from gated_jax.training.custom import Custom
from gated_jax.training.custom import OwnData
from gated_jax.training.custom import checked
from gated_jax.training.evaluation import Evaluation
from gated_jax.training.evaluation import prompt_from
from gated_jax.training.metrics import Clock
from gated_jax.training.metrics import Metrics
from gated_jax.training.optimizer import make_optimizer
from gated_jax.training.optimizer import make_schedule
from gated_jax.training.parts import trained_part
from gated_jax.training.rows import HostRows
from gated_jax.training.rows import rows_of_process
from gated_jax.training.rows import to_devices
from gated_jax.training.step import TrainState
from gated_jax.training.step import make_init
from gated_jax.training.step import make_step
from gated_jax.training.step import state_shardings
from gated_jax.training.warm_start import base_of_start
from gated_jax.training.warm_start import load_start


@dataclasses.dataclass
class RunState:
  """The objects of one run, made by `build`. Only `state` changes."""

  config: RunConfig
  workdir: Path
  mesh: jax.sharding.Mesh
  model: Decoder
  abstract: TrainState
  state: TrainState
  step: Any
  data: Pipeline | OwnData
  evaluation: Evaluation
  checkpoints: Checkpoints
  metrics: Metrics
  console: Console
  clock: Clock
  callbacks: Sequence[Callback] = ()


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


def check_platform(config: ModelConfig, platform: str) -> None:
  """NotImplementedError where this hardware lacks what is asked for."""
  attention.check_platform(config.attention, platform)
  if config.has_experts:
    moe.check_platform(config.moe.implementation, platform)
  delta.check_platform(config.delta.implementation, platform)


def check_rows(config: RunConfig) -> None:
  """ValueError where a layer needs to know what rows do not say."""
  if config.data.rows != 'joined':
    return
  for layer in config.model.distinct_layers:
    if mixer_named(layer.mixer).restarts_by_document:
      raise ValueError(
        f"data.rows='joined' does not say where documents begin, and the mixer "
        f"{layer.mixer!r} restarts there: use data.rows='cut' or 'whole'"
      )


def check_memory(config: RunConfig, devices: Sequence[jax.Device]) -> None:
  """ValueError where a model or a batch needs more memory than there is."""
  check_fits(config.model, devices)
  batch, length = config.data.batch, config.data.length
  arrays = arrays_of(config.data.rows).values()
  memory.check(
    f'batches of data.batch={batch} rows with data.length={length} tokens',
    batch * length * sum(np.dtype(kind).itemsize for kind in arrays),
    devices,
  )


def build(
  config: RunConfig,
  workdir: Path,
  console: Console,
  custom: Custom = Custom(),
) -> RunState:
  """Everything a run needs, restored from its newest checkpoint if any.

  Raises:
    ValueError: something that the user has to change.
    CannotResume: the workdir holds another run.
    CheckpointError: it holds checkpoints, and none of them can be read.
  """
  check_platform(config.model, jax.devices()[0].platform)
  check_rows(config)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  clock = Clock()
  shape = (config.data.batch, config.data.length)
  check_memory(config, jax.devices())
  sharding.check_batch(mesh, *shape, config.optimizer.accumulate)
  model = Decoder(config.model)
  with sharding.activate(mesh):
    abstract, init, step = make_functions(config, model, mesh, custom)

  rows = sharding.batch_sharding(mesh)
  own = rows_of_process(rows, *shape)
  data = _training_data(config, own, custom)
  with sharding.activate(mesh):
    checkpoints = Checkpoints(
      workdir / 'checkpoints', config, console.say, custom.loss_name
    )
    restored = checkpoints.restore(abstract)
    if restored is None:
      state = init(jax.random.key(config.seed))
      if config.init_from:
        params = load_start(config, abstract.params, mesh, state.params)
        state = state.replace(params=params)
        checkpoints.base = base_of_start(config, params)
    else:
      state, position, changed = restored
      _restore_data(data, position, checkpoints.path(int(state.step)))
      console.say(f'resuming after step {int(state.step)}')
      for name, (old, new) in changed.items():
        console.say(f'changed since: {name} {old!r} -> {new!r}')

  evaluation = _evaluation(config, model, rows, own, custom)
  return RunState(
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
    callbacks=custom.callbacks,
  )


def _training_data(
  config: RunConfig, own: HostRows, custom: Custom
) -> Pipeline | OwnData:
  """The batches of the config's files, or the caller's; reads ahead."""
  if custom.data is not None:
    return OwnData(custom.data, config.data, len(own.rows))
  data = read(config, 'train', own)
  data.start()
  return data


def _restore_data(data: Pipeline | OwnData, position: str, step: Path) -> None:
  """Goes on reading at a position; CannotResume, in all, where one cannot."""
  problem = ''
  try:
    data.restore(position.encode())
  except ValueError as error:
    problem = str(error)
  problem = first_problem(problem)
  if problem:
    raise CannotResume(f'{step}: {problem}', step)


def make_functions(
  config: RunConfig,
  model: Decoder,
  mesh: jax.sharding.Mesh,
  custom: Custom = Custom(),
) -> tuple[TrainState, Any, Any]:
  """The state's shapes and places; init and step, jitted for them.

  Args:
    config: of the run.
    model: made from it.
    mesh: whose devices need not be there.
    custom: a caller's own optimizer and loss, if any.
  """
  length = config.data.length
  boxed = boxed_parameters(config.model, length)
  adapters.adapted(config.model)  # refuses a pattern that matches nothing
  part = trained_part(config.optimizer.train, boxed)
  optimizer, schedule = custom.optimizer, None
  if optimizer is None:
    optimizer = make_optimizer(config.optimizer, config.steps, boxed)
    schedule = make_schedule(config.optimizer, config.steps)
  init = make_init(model, optimizer, length, part)
  # Nothing is computed here: the mesh may be of devices that are not there.
  key = jax.eval_shape(lambda: jax.random.key(config.seed))
  shapes = jax.eval_shape(init, key)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  places = state_shardings(shapes, sharding.shardings(mesh, boxed), everywhere)
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )
  step = make_step(
    model, optimizer, schedule, config.optimizer, part, custom.loss
  )
  kind = mesh.devices.flat[0].device_kind
  jitted_step = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(places, everywhere),
    compiler_options=chips.compiler_options(kind),
  )
  return abstract, jax.jit(init, out_shardings=places), jitted_step


def read(config: RunConfig, split: str, own: HostRows) -> Pipeline:
  """This process's rows of a split's batches."""
  return make_pipeline(
    config.data,
    split,
    shard=own.part,
    shards=own.parts,
    vocab=config.model.vocab,
  )


def _evaluation(
  config: RunConfig, model: Decoder, rows: Any, own: HostRows, custom: Custom
) -> Evaluation:
  """Reads the held-out batches, once."""
  if custom.data is not None:
    batches = [checked(b, config.data, len(own.rows)) for b in custom.held_out]
    return Evaluation(model, [to_devices(b, rows, own) for b in batches], 0.0)
  if not config.data.validation:
    return Evaluation(model, [], 0.0)
  with read(config, 'validation', own) as pipeline:
    named = [
      (pipeline.source, batch)
      for batch, _ in zip(pipeline, range(config.eval_batches), strict=False)
    ]
    sources, batches = [list(x) for x in zip(*named, strict=True)]
    known = target_bytes(
      config.data, batches, pipeline.tokenizer.byte_lengths()
    )
  if own.parts > 1:
    sums = np.asarray(multihost_utils.process_allgather(np.float64(known)))
    known = float(sums.sum()) * own.parts / jax.process_count()
  prompt = prompt_from(batches, pipeline.tokenizer) if known else ''
  placed = [to_devices(batch, rows, own) for batch in batches]
  return Evaluation(model, placed, known, prompt=prompt, sources=sources)
