"""Time of a decoding step, against memory traffic and against transformers.

    python -m gated_jax.decode.bench
    python -m gated_jax.decode.bench --transformers
    python -m gated_jax.decode.bench --linear

A step has to read all weights once and what its layers know of all rows: keys
and values, or with --linear mostly matrices whose size no length changes. That
many bytes over the bandwidth of this machine, measured by reading an array of
the same size as the weights, is the time it could take. `--transformers` runs
the same weights through `transformers` on the CPU, eager and compiled, turn by
turn in one process (needs torch and transformers). Where other programs use
the machine too, `taskset -c 0` and --cpu_time compare the work of one core.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from gated_jax import cli
from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import RopeConfig
from gated_jax.decode.generate import buckets
from gated_jax.decode.generate import generate
from gated_jax.decode.weights import Params
from gated_jax.decode.weights import for_decoding
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder
from gated_jax.platform import skip_absent_tpu

PROMPT = 32
# Says how long the last call took, prefill left out: seconds.
Timed = Callable[[], float]
Clock = Callable[[], float]


def settings(flags: argparse.Namespace) -> ModelConfig:
  """A small Qwen3 or Qwen3.5, which transformers has too."""
  plain = ModelConfig(
    vocab=8192,
    length=1024,
    depth=flags.depth,
    width=flags.width,
    heads=flags.width // 64,
    kv_heads=flags.width // 128,
    head_dim=64,
    mlp_width=3 * flags.width,
    dtype=flags.dtype,
    gate=GateConfig() if flags.gated else GateConfig(position='none'),
  )
  if not flags.linear:
    return plain
  return dataclasses.replace(
    plain,
    gate=GateConfig(),
    norm_zero_centered=True,
    rope=RopeConfig(fraction=0.25),
    pattern=('gated_deltanet',) * 3 + ('attention',),
    delta=DeltaConfig(
      key_heads=flags.width // 128,
      value_heads=flags.width // 64,
      key_dim=64,
      value_dim=64,
    ),
  )


def bandwidth(size: int, clock: Clock) -> float:
  """Bytes a second at which an array of `size` bytes is read, the best of 9."""
  x = jnp.ones((size // 4096, 1024), jnp.float32)
  y = jnp.ones((1024,), jnp.float32)
  read = jax.jit(lambda x, y: x @ y)
  jax.block_until_ready(read(x, y))
  best = float('inf')
  for _ in range(9):
    start = clock()
    jax.block_until_ready(read(x, y))
    best = min(best, clock() - start)
  return x.nbytes / best


def traffic(
  config: ModelConfig, params: Params, batch: int, room: int
) -> tuple[int, int]:
  """Bytes of weights and of cache that one step reads.

  Args:
    config: of the model.
    params: as they are stored.
    batch: rows.
    room: tokens of a row that a cache of keys has room for; all is read.
  """
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  if not config.tie_embeddings:  # a lookup reads a few rows
    weights -= params['embed']['embedding'].nbytes
  states = jax.eval_shape(lambda: init_cache(config, batch, room))
  sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(states))
  return weights, sum(sizes)


def ours(
  config: ModelConfig,
  params: Params,
  prompts: np.ndarray,
  new: int,
  clock: Clock,
) -> Timed:
  """Seconds of `new` steps."""
  model = Decoder(config)

  def run() -> float:
    """Seconds of all steps after the first, which reads the prompts."""
    steps = generate(model, params, list(prompts), max_tokens=new + 1)
    next(steps)
    start = clock()
    for _ in steps:
      pass
    return clock() - start

  return run


def theirs(
  folder: pathlib.Path,
  prompts: np.ndarray,
  new: int,
  compiled: bool,
  clock: Clock,
) -> Timed:
  """Seconds that `transformers` takes for `new` tokens more than one."""
  import torch
  import transformers

  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  if compiled:
    model.forward = torch.compile(model.forward)
  tokens = torch.tensor(prompts, dtype=torch.long)
  options = {
    'do_sample': False,
    'pad_token_id': 0,
    'eos_token_id': None,
    'attention_mask': torch.ones_like(tokens),
  }
  if compiled:
    options['cache_implementation'] = 'static'

  def seconds(count: int) -> float:
    """Seconds for this many new tokens, the prompts' included."""
    start = clock()
    with torch.inference_mode():
      ids = model.generate(
        tokens, max_new_tokens=count, min_new_tokens=count, **options
      )
    assert ids.shape[1] == tokens.shape[1] + count
    return clock() - start

  return lambda: seconds(new + 1) - seconds(1)


def compare(
  config: ModelConfig, params: Params, flags: argparse.Namespace, batch: int
) -> None:
  """Prints a table of all that run, turn by turn."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, config.vocab, (batch, PROMPT), np.int32)
  plain, ready = for_decoding(config, params)
  clock = time.process_time if flags.cpu_time else time.perf_counter
  runs: dict[str, Timed] = {
    'gated_jax': ours(plain, ready, prompts, flags.new, clock)
  }
  with tempfile.TemporaryDirectory() as parent:
    if flags.transformers:
      from gated_jax.hf import convert

      folder = pathlib.Path(parent) / 'model'
      convert.save(folder, params, config)
      for name, compiled in (('eager', False), ('compiled', True)):
        run = theirs(folder, prompts, flags.new, compiled, clock)
        runs[f'transformers, {name}'] = run
    for run in runs.values():
      run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(flags.rounds):
      for name, run in runs.items():
        seconds[name].append(run())
  room = buckets(PROMPT, flags.new + 1).cache
  weights, cache = traffic(plain, ready, batch, room)
  speed = bandwidth(weights, clock)
  ideal = (weights + cache) / speed
  print(
    f'\nbatch {batch}: {weights / 1e6:.1f} MB of weights and '
    f'{cache / 1e6:.1f} MB of cache a step; {speed / 1e9:.1f} GB/s; '
    f'at least {1e3 * ideal:.2f} ms'
  )
  print('| | ms a step | tokens/s | of the bandwidth |\n|---|---|---|---|')
  for name, values in seconds.items():
    step = statistics.median(values) / flags.new
    print(
      f'| {name} | {1e3 * step:.2f} | {batch / step:.1f} | '
      f'{ideal / step:.0%} |',
      flush=True,
    )


def read_flags(argv: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(prog='python -m gated_jax.decode.bench')
  parser.add_argument('--transformers', action='store_true')
  parser.add_argument('--cpu_time', action='store_true')
  parser.add_argument('--gated', action='store_true')
  parser.add_argument('--linear', action='store_true')
  parser.add_argument('--batch', type=cli.count, nargs='+', default=[1, 16])
  parser.add_argument('--new', type=cli.count, default=64)
  parser.add_argument('--rounds', type=cli.count, default=5)
  parser.add_argument('--depth', type=cli.count, default=8)
  parser.add_argument('--width', type=cli.count, default=512)
  parser.add_argument('--dtype', default='float32')
  return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> None:
  """Prints a table for each batch."""
  config = settings(flags)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(Decoder(config).init)(jax.random.key(0), tokens)['params']
  params = meta.unbox(params)
  print(f'{jax.devices()[0].device_kind}, {flags.new} steps', flush=True)
  for batch in flags.batch:
    compare(config, params, flags, batch)


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  return cli.run(lambda: run(read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
