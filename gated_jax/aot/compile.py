"""Compiles a config's real train step for a pod that is not there.

The step, its state and their shardings are the ones that training uses; only
the devices differ. What is chosen by platform ('auto') is chosen as it would
be on a TPU. The same for the loss alone, as evaluation computes it.
"""

import dataclasses
import math
from typing import Any

import jax

from gated_jax import sharding
from gated_jax.chips import LANES
from gated_jax.config import RunConfig
from gated_jax.data.batch import arrays_of
from gated_jax.evals import likelihood
from gated_jax.model.decoder import Decoder
from gated_jax.ops.attention import api
from gated_jax.training import build


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device."""

  parameters: int
  optimizer: int  # everything else that the state holds
  batch: int
  peak: int  # the whole program's

  @property
  def activations(self) -> int:
    """All that is alive at the peak beside state and batch."""
    return max(self.peak - self.parameters - self.optimizer - self.batch, 0)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step and what it was compiled for."""

  config: RunConfig  # every 'auto' is replaced by its choice
  mesh: Any
  state: Any  # abstract arrays with their shardings
  text: str
  memory: Memory


def shard_bytes(tree: Any) -> int:
  """Bytes that one device holds of abstract arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def on_tpu(config: RunConfig) -> list[RunConfig]:
  """The config with 'auto' spelt out: what a TPU tries, in its order."""
  model = config.model
  if model.has_experts and model.moe.implementation == 'auto':
    moe = dataclasses.replace(model.moe, implementation='gmm')
    model = dataclasses.replace(model, moe=moe)
  linear = any(x.mixer == 'gated_deltanet' for x in model.distinct_layers)
  if linear and model.delta.implementation == 'auto':
    whole = not (model.delta.key_dim % LANES or model.delta.value_dim % LANES)
    kind = 'pallas_tpu' if whole else 'chunks'
    delta = dataclasses.replace(model.delta, implementation=kind)
    model = dataclasses.replace(model, delta=delta)
  names = api.candidates(model.attention, platform='tpu')
  return [
    dataclasses.replace(
      config, model=dataclasses.replace(model, attention=name)
    )
    for name in names
  ]


def compile_step(
  config: RunConfig, devices: list[Any], train: bool = True
) -> Compiled:
  """Compiles the train step of `config` for `devices`.

  Args:
    config: every setting.
    devices: of a topology.
    train: False: the loss of held-out text in its place.

  Raises:
    ValueError: the config does not fit the devices.
    NotImplementedError: the attention backend asked for cannot do this.
    jax.errors.JaxRuntimeError: the compiler gave up, on memory for one.
  """
  candidates = on_tpu(config)
  for candidate in candidates:
    try:
      return _compile(candidate, devices, train)
    except NotImplementedError:
      if candidate is candidates[-1]:
        raise
  raise AssertionError('there is at least one candidate')


def _compile(config: RunConfig, devices: list[Any], train: bool) -> Compiled:
  mesh = sharding.make_mesh(config.mesh, devices)
  rows = sharding.batch_sharding(mesh)
  shape = (config.data.batch, config.data.length)
  sharding.check_batch(mesh, *shape, config.optimizer.accumulate)
  batch = {
    name: jax.ShapeDtypeStruct(shape, kind, sharding=rows)
    for name, kind in arrays_of(config.data.rows).items()
  }
  with sharding.activate(mesh):
    model = Decoder(config.model)
    state: Any
    state, _, step = build.make_functions(config, model, mesh)
    if train:
      compiled = step.lower(state, batch).compile()
    else:
      state = state.replace(opt_state=())
      sums = likelihood.sums_on(devices[0].device_kind)
      compiled = sums.lower(model, state.params, batch).compile()
  parameters = shard_bytes(state.params)
  memory = Memory(
    parameters=parameters,
    optimizer=shard_bytes(state) - parameters,
    batch=shard_bytes(batch),
    peak=compiled.memory_analysis().peak_memory_in_bytes,
  )
  return Compiled(config, mesh, state, compiled.as_text(), memory)
