"""The train step as a run takes it: loss, gradients, clipping, AdamW.

Everything comes from `gated_jax/training/build.py`; only the tokens are made
up. Variants (gates, say) take turns, each with a state of its own that is
thrown away after its turn, so that one at a time has to fit.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gated_jax import sharding
from gated_jax.bench.timing import summary
from gated_jax.config import DataConfig
from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.model.accounting import parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training.build import make_functions
from gated_jax.training.parts import step_flops

# The paper's dense model, a middle one of the same heads, configs/smoke.py's, a
# small Qwen3.5, and one for tests.
MODELS = {
  '1b7': ModelConfig(),
  '400m': ModelConfig(
    vocab=50_304,
    depth=24,
    width=1024,
    heads=8,
    kv_heads=4,
    mlp_width=3584,
  ),
  'smoke': ModelConfig(
    vocab=320,
    depth=4,
    width=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=384,
    dtype='float32',
  ),
  # The sizes of `gated_jax.decode.bench --linear`.
  'hybrid': ModelConfig(
    vocab=8192,
    depth=8,
    width=512,
    heads=8,
    kv_heads=4,
    head_dim=64,
    mlp_width=1536,
    norm_zero_centered=True,
    rope=RopeConfig(fraction=0.25),
    pattern=('gated_deltanet',) * 3 + ('attention',),
    delta=DeltaConfig(key_heads=4, value_heads=8, key_dim=64, value_dim=64),
    dtype='float32',
  ),
  'tiny': ModelConfig(
    vocab=300,
    depth=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_width=64,
    dtype='float32',
  ),
}


GATES = {
  'none': GateConfig(position='none'),
  'headwise': GateConfig(granularity='headwise'),
  'elementwise': GateConfig(),
  'shared': GateConfig(shared=True),
  'parameter': GateConfig(source='parameter', init='zeros'),
  'rms_norm': GateConfig(kind='rms_norm'),
  'silu': GateConfig(kind='silu'),
  'exclusive': GateConfig(kind='exclusive'),
  **{
    position: GateConfig(position=position)
    for position in ('query', 'key', 'value', 'dense_output')
  },
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """The batch of one step, its model, and how it is compiled."""

  model: str = '400m'
  gate: str = 'elementwise'  # a name in GATES
  batch: int = 8
  length: int = 4096
  rows: str = 'whole'  # 'packed': several documents in each
  remat: str = 'minimal'
  scan: bool = False  # compiles quicker, but copies every layer's arrays
  logit_chunk: int = 0
  attention: str = 'auto'
  depth: int = 0  # layers; 0: the model's own

  def run(self) -> RunConfig:
    """The settings of a run like this."""
    if self.gate not in GATES:
      raise ValueError(f'gate={self.gate!r} must be one of {", ".join(GATES)}')
    model = dataclasses.replace(
      MODELS[self.model],
      length=self.length,
      depth=self.depth or MODELS[self.model].depth,
      gate=GATES[self.gate],
      remat=self.remat,
      scan=self.scan,
      logit_chunk=self.logit_chunk,
      attention=self.attention,
    )
    data = DataConfig(source='synthetic', batch=self.batch, length=self.length)
    return RunConfig(model=model, data=data)

  def batch_of(self, seed: int = 0) -> dict[str, Any]:
    """Random tokens. Whole rows are one document and need no segments."""
    rng = np.random.default_rng(seed)
    shape = (self.batch, self.length)
    tokens = rng.integers(0, MODELS[self.model].vocab, (2, *shape), np.int32)
    segments = positions = None
    if self.rows == 'packed':
      starts = rng.random(shape) < 8 / self.length
      starts[:, 0] = True
      segments = np.cumsum(starts, axis=1, dtype=np.int32)
      index = np.arange(self.length, dtype=np.int32)
      latest = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
      positions = index - latest
    return {
      'tokens': tokens[0],
      'targets': tokens[1],
      'segments': segments,
      'positions': positions,
      'weights': np.ones(shape, np.float32),
    }


class Compiled:
  """A workload's init and step, compiled, with a batch on the device."""

  def __init__(self, work: Workload):
    config = work.run()
    self.work, self.config = work, config
    self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    self.key = jax.random.key(config.seed)
    rows = sharding.batch_sharding(self.mesh)
    self.batch = jax.device_put(work.batch_of(), rows)
    start = time.perf_counter()
    with sharding.activate(self.mesh):
      abstract, self.init, step = make_functions(
        config, Decoder(config.model), self.mesh
      )
      self.step = step.lower(abstract, self.batch).compile()
    self.compile_seconds = time.perf_counter() - start

  def memory(self) -> float:
    """GiB that the step holds at once, by the compiler's own account."""
    memory = self.step.memory_analysis()
    if memory is None:
      return 0.0
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (held + new) / 2**30

  def turn(
    self, steps: int, clock: Callable[[], float] = time.perf_counter
  ) -> tuple[float, float, float]:
    """(seconds of a step, first loss, last loss) from a fresh state."""
    with sharding.activate(self.mesh):
      state = self.init(self.key)
      state, metrics = self.step(state, self.batch)
      first = float(metrics['loss'])
      start = clock()
      for _ in range(steps):
        state, metrics = self.step(state, self.batch)
      jax.block_until_ready(state)
      seconds = (clock() - start) / steps
    return seconds, first, float(metrics['loss'])


def bench(
  works: Mapping[str, Workload],
  rounds: int,
  steps: int,
  ceiling: float,
  clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
  """One record for each workload.

  Args:
    works: by name; the first is what the others' overhead is relative to.
    rounds: how often their turns come.
    steps: in a turn, after one that is not timed.
    ceiling: FLOP/s of a large product, to which utilisation relates.
    clock: seconds.
  """
  made: dict[str, Compiled] = {}
  failed: dict[str, str] = {}
  for name, work in works.items():
    try:
      made[name] = Compiled(work)
      made[name].turn(1)
    except jax.errors.JaxRuntimeError as error:
      made.pop(name, None)
      failed[name] = str(error).splitlines()[0][:200]
    gc.collect()
  samples: dict[str, list[float]] = {name: [] for name in made}
  losses = {}
  for _ in range(rounds):
    for name, compiled in made.items():
      seconds, *losses[name] = compiled.turn(steps, clock)
      samples[name].append(seconds)
  records = []
  for name, compiled in made.items():
    times = summary(samples[name])
    work = compiled.work
    records.append(
      {
        'bench': 'step',
        'framework': 'gated_jax',
        'name': name,
        **dataclasses.asdict(work),
        **rates(work, times.median, ceiling),
        'spread': times.spread,
        'memory_gib': compiled.memory(),
        'compile_s': compiled.compile_seconds,
        'losses': losses[name],
      }
    )
  base = records[0] if records else {}
  for record in records:
    # The time of the gate's own FLOPs, one product, is not overhead.
    more = record['tflop'] / base['tflop'] - 1
    record['more_flops'] = more
    record['more_time'] = record['ms'] / base['ms'] - 1
    record['overhead'] = record['more_time'] - more
  return records + [
    {'bench': 'step', 'name': n, **dataclasses.asdict(works[n]), 'failed': e}
    for n, e in failed.items()
  ]


def rates(work: Workload, seconds: float, ceiling: float) -> dict[str, float]:
  """Rates that follow from a step's time."""
  run = work.run()
  config = run.model
  flops = sum(step_flops(run).values())
  speed = work.batch * work.length / seconds
  return {
    'parameters': parameters(config)['total'],
    'ms': 1e3 * seconds,
    'tflop': flops * work.batch * work.length / 1e12,
    'tokens_per_second': speed,
    'mfu': flops * speed / ceiling if ceiling else 0.0,
  }
