"""The gate's cost in one layer of the dense 1.7B model, by the TPU compiler.

    python -m gated_jax.aot.layer --target=v5e

Forward and backward of attention, MLP and norms over 4 x 4096 tokens, without
a gate, headwise and elementwise, with and without remat: the compiler's
estimate for everything outside kernels, and for attention's their schedules
(`attention_kernels.py`). Once with the kernels that have the gate inside, once
with JAX's splash and the gate after it. Nothing is run.

Weights are float32, as parameters are, and are cast. --weights=bfloat16 leaves
that out, as it nearly is on a pod, where each device casts its share of them
before they are gathered.

What a gate costs beyond its own projection is the layer's cycles less those of
the layer without one, less the FLOPs of that projection over the matrix units'
rate. The last column is what is saved for backward, per token.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp

from gated_jax import chips
from gated_jax import cli
from gated_jax.aot import kernels
from gated_jax.aot.attention_kernels import TARGETS
from gated_jax.aot.attention_kernels import compiling_for
from gated_jax.aot.attention_kernels import device_of
from gated_jax.aot.attention_kernels import estimate_ours
from gated_jax.aot.attention_kernels import estimate_peer
from gated_jax.aot.dumps import run_with_dumps
from gated_jax.aot.program import Program
from gated_jax.aot.topology import chip_of
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.model.block import SAVED
from gated_jax.model.block import Block
from gated_jax.model.mixer import Context
from gated_jax.ops import rope

ROWS, LENGTH = 4, 4096
GATES = {
  'none': GateConfig(position='none'),
  'headwise': GateConfig(granularity='headwise'),
  'elementwise': GateConfig(granularity='elementwise'),
}
REMAT = ('none', 'minimal', 'full')
BACKENDS = ('pallas_tpu', 'splash')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Figures of one layer, forward and backward."""

  xla: float  # cycles
  kernels: float  # cycles
  flops: float  # those of products outside kernels
  saved: float  # bytes for each token

  @property
  def cycles(self) -> float:
    """Cycles of XLA and of kernels."""
    return self.xla + self.kernels


def layer(config: ModelConfig) -> tuple[Callable, tuple[Any, Any]]:
  """A function of (parameters, x) to the layer's output; both, abstract."""
  x = jax.ShapeDtypeStruct((ROWS, config.length, config.width), config.dtype)
  # The initialiser runs no kernel.
  plain = dataclasses.replace(config, attention='xla')

  def context(x: Any) -> Context:
    """Positions and their rotation, without documents."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    rotation = rope.rotation(positions, config.head_dim, config.rope)
    return Context(rotations=(rotation,))

  def start(x: Any) -> Any:
    """Parameters of one layer; plain attention, which any host can trace."""
    module = Block(plain, plain.layers[0])
    return module.init(jax.random.key(0), x, None, context(x))['params']

  def run(parameters: Any, x: Any) -> Any:
    """The layer's output."""
    module = Block(config, config.layers[0])
    return module.apply({'params': parameters}, x, None, context(x))[0]

  if config.remat != 'none':
    names = SAVED[config.remat]
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    run = jax.checkpoint(run, policy=policy)
  return run, (jax.eval_shape(start, x), x)


def saved_bytes(run: Callable, arguments: tuple[Any, Any]) -> float:
  """Bytes that forward saves for backward, for each token, less the input."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    jax.ad_checkpoint.print_saved_residuals(run, *arguments)
  total = 0
  for line in text.getvalue().splitlines():
    kind, _, where = line.partition(' ')
    array = re.fullmatch(r'([a-z]+)(\d+)\[([\d,]+)\]', kind)
    if not array or where.startswith('from the argument'):
      continue
    shape = [int(n) for n in array.group(3).split(',')]
    if shape[0] == ROWS and LENGTH in shape:
      total += math.prod(shape) * int(array.group(2)) // 8
  return total / (ROWS * LENGTH)


def _compile(run: Callable, arguments: tuple[Any, Any], device: Any) -> Program:
  """Forward and backward, with the output that the next layer reads."""

  def both(parameters: Any, x: Any, d_output: Any) -> Any:
    """The output and the gradients of parameters and input."""
    output, pull = jax.vjp(run, parameters, x)
    return output, pull(d_output)

  place = jax.sharding.SingleDeviceSharding(device)
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
  )
  options = chips.compiler_options(device.device_kind)
  step = jax.jit(both, compiler_options=options)
  compiled = step.lower(*placed, placed[1]).compile()
  text = compiled.as_text()
  assert text is not None
  return Program(text)


@dataclasses.dataclass(frozen=True)
class Prices:
  """Cycles of one head in attention's kernels, forward and backward."""

  kind: str
  ours: dict[str, tuple[float, float]]
  splash: tuple[float, float]
  rotation: dict[str, tuple[float, float]]  # one token's, by heads
  stream: tuple[float, float]  # one token's

  def of(self, program: Program, backend: str, gate: str, heads: int) -> float:
    """Cycles of all kernels that a program calls."""
    price = self.ours[gate] if backend == 'pallas_tpu' else self.splash
    each = ROWS * heads / chips.TPUS[self.kind].cores
    total = 0.0
    for kernel in program.kernels():
      if kernel.name in (*kernels.ROTATION, kernels.MEAN, kernels.STREAM):
        known = {'rotation': self.rotation, 'stream': self.stream}
        one = kernels.price(kernel, known)
        total += kernel.calls * (one or 0.0)
        continue
      backward = 'backward' in kernel.name or 'dkv' in kernel.name
      total += kernel.calls * each * price[backward]
    return total


def _write_prices(kind: str, folder: pathlib.Path) -> None:
  """Compiles the kernels by themselves, and prints what they cost."""
  ours = {
    gate: estimate_ours(kind, gate, LENGTH, folder).cycles for gate in GATES
  }
  peer = estimate_peer(kind, 'splash (JAX)', LENGTH, folder)
  rotations = {
    heads: kernels.rotation(kind, LENGTH, heads, folder)
    for heads in (ModelConfig.heads, ModelConfig.kv_heads)
  }
  prices = {
    'ours': ours,
    'splash': peer.cycles,
    'rotation': rotations,
    'stream': kernels.stream(kind, LENGTH, ModelConfig.width, folder),
  }
  print(json.dumps(prices))


def prices(kind: str) -> Prices:
  """Runs a process of its own: schedules of a whole layer take an hour."""
  done = run_with_dumps(
    'gated_jax.aot.layer',
    [f'--target={kind}'],
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    raise RuntimeError('the kernels did not compile')
  return Prices(kind, **json.loads(done.stdout.splitlines()[-1]))


def costs(
  backend: str, plain: ModelConfig, device: Any, price: Prices
) -> Iterator[tuple[str, Cost]]:
  """The cost of a layer with each gate, by the gate's name."""
  for gate, gate_config in GATES.items():
    config = dataclasses.replace(plain, gate=gate_config, attention=backend)
    with compiling_for(device):
      run, arguments = layer(config)
      program = _compile(run, arguments, device)
      saved = saved_bytes(run, arguments)
    inside = price.of(program, backend, gate, config.heads)
    yield gate, Cost(program.cycles, inside, program.flops, saved)


def table(
  kind: str, backends: list[str], policies: list[str], weights: str
) -> None:
  """Prints the table, a line as soon as it is known."""
  device = device_of(kind)
  rate = chip_of([device]).flops_per_cycle
  price = prices(kind)
  print('ESTIMATES by the TPU compiler: no TPU was used.')
  print(
    f'{kind}, {ROWS} x {LENGTH} tokens, {weights} weights, million cycles of a '
    'layer forward and backward'
  )
  print(
    f'{"":<44}{"XLA":>8}{"kernels":>9}{"both":>8}{"FLOPs of":>10}'
    f'{"beyond":>9}{"":>8}{"saved,":>9}'
  )
  print(
    f'{"attention":<18}{"remat":<10}{"gate":<16}{"":>25}'
    f'{"the gate":>10}{"them":>9}{"":>8}{"B/token":>9}'
  )
  for backend, remat in itertools.product(backends, policies):
    plain = None
    config = ModelConfig(
      depth=1, length=LENGTH, remat=remat, param_dtype=weights
    )
    for gate, cost in costs(backend, config, device, price):
      plain = plain or cost
      own = (cost.flops - plain.flops) / rate
      beyond = cost.cycles - plain.cycles - own
      print(
        f'{backend:<18}{remat:<10}{gate:<16}{cost.xla / 1e6:>8.2f}'
        f'{cost.kernels / 1e6:>9.2f}{cost.cycles / 1e6:>8.2f}{own / 1e6:>10.2f}'
        f'{beyond / 1e6:>9.2f}{beyond / plain.cycles:>8.1%}{cost.saved:>9,.0f}',
        flush=True,
      )


def print_tables(arguments: list[str]) -> int:
  """Prints the table of one kind of chip."""
  parser = cli.Parser(
    prog='python -m gated_jax.aot.layer',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--target', default='v5e', choices=TARGETS)
  parser.add_argument('--attention', nargs='*', choices=BACKENDS)
  parser.add_argument('--remat', nargs='*', choices=REMAT)
  parser.add_argument(
    '--weights', default='float32', choices=('float32', 'bfloat16')
  )
  parser.add_argument('--dumps', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args(arguments)
  if flags.dumps:
    _write_prices(flags.target, pathlib.Path(flags.dumps))
  else:
    backends = flags.attention or list(BACKENDS)
    table(flags.target, backends, flags.remat or list(REMAT), flags.weights)
  return 0


def main(arguments: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  return cli.run(lambda: print_tables(arguments))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
