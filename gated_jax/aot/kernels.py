"""Cycles of a call of each of our kernels, by the schedule of its program.

    python -m gated_jax.aot.kernels --target=v5e

The kernels are compiled by themselves, in a process apart: the compiler writes
schedules only if it was told so when it was loaded, and takes an hour to write
those of a whole step. `schedule.py` reads them.
Waiting for memory is not in them, except where it is said.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gated_jax import chips
from gated_jax import cli
from gated_jax.aot import delta_kernels
from gated_jax.aot import kernel_cycles
from gated_jax.aot.attention_kernels import GATES
from gated_jax.aot.attention_kernels import TARGETS
from gated_jax.aot.attention_kernels import device_of
from gated_jax.aot.attention_kernels import estimate_ours
from gated_jax.aot.dumps import run_with_dumps
from gated_jax.aot.program import Kernel
from gated_jax.chips import LANES
from gated_jax.config import RunConfig
from gated_jax.ops import norm_tpu
from gated_jax.ops import rope
from gated_jax.ops import rope_tpu

# Which pass a kernel's price belongs to.
ATTENTION = {'gated_attention_forward': 0, 'gated_attention_backward': 1}
ROTATION = {'rotate_forward': 0, 'rotate_backward': 1}
MEAN, STREAM = 'norm_mean_square', 'norm_backward'

Price = Callable[[Kernel], float | None]


def prices(kind: str, config: RunConfig, tensor: int) -> Price:
  """Cycles of one call, for kernels whose schedules could be counted.

  Args:
    kind: a name of `chips.TPUS`; without block sizes it has no prices.
    config: whose attention it is: causal, over the whole length.
    tensor: devices that share its heads.
  """
  model = config.model
  if kind not in TARGETS:
    return lambda kernel: None
  heads = max(1, model.heads // tensor)
  kv_heads = max(1, model.kv_heads // tensor)
  delta = delta_kernels.Sizes.of(config, tensor)
  done = run_with_dumps(
    'gated_jax.aot.kernels',
    [
      f'--target={kind}',
      f'--length={config.data.length}',
      f'--gate={_gate(config)}',
      f'--heads={heads},{kv_heads}',
      f'--width={model.width}',
      f'--delta={",".join(map(str, delta or ()))}',
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    return lambda kernel: None
  known = json.loads(done.stdout.splitlines()[-1])
  whole = config.data.length if config.mesh.context > 1 else 0
  return lambda kernel: price(kernel, known, whole)


def _gate(config: RunConfig) -> str:
  gate = config.model.gate
  return gate.granularity if gate.fused else 'none'


def price(
  kernel: Kernel, known: dict[str, Any], whole: int = 0
) -> float | None:
  """Cycles of a call, whose operands say how many rows and heads it has.

  Args:
    kernel: of a compiled program.
    known: cycles of one head in `attention`, of a token and so many heads in
      `rotation`, of a token in `stream`, each forward and backward, and what
      `delta_kernels.estimate` gave in `delta`.
    whole: length of a sequence that is split over devices; 0: it is not.
  """
  if kernel.name in ATTENTION:
    # The log-sum-exp, which both passes have.
    text = ' '.join((*kernel.operands, kernel.output))
    sizes = re.search(r'f32\[(\d+),(\d+),1,(\d+)\]', text)
    if sizes:
      rows, heads, queries = map(int, sizes.groups())
      calls = rows * heads * (_share(kernel, queries, whole) if whole else 1)
      return calls * known['attention'][ATTENTION[kernel.name]]
  if 'delta' in known:
    cycles = delta_kernels.price(kernel, known['delta'])
    if cycles is not None:
      return cycles
  # The last axes, as it may be one layer of a stack that is written.
  sizes = re.search(r'(\d+),(\d+),(\d+)\]', kernel.output)
  if not sizes:
    return None
  b, t, width = map(int, sizes.groups())
  if kernel.name == MEAN and 'stream' in known:
    return b * width * known['stream'][0]  # [B, 1, T]
  if kernel.name == STREAM and 'stream' in known:
    return b * t * known['stream'][1]
  each = known['rotation'].get(str(width // LANES))
  if kernel.name in ROTATION and each:
    return b * t * each[ROTATION[kernel.name]]
  return None


def _share(kernel: Kernel, queries: int, whole: int) -> float:
  """The share of a causal head's squares that a call of one chunk computes.

  A chunk with itself is half a square. With all keys it is as many as there
  are chunks before it: of a device's two chunks, together all but one
  (`gated_jax/ops/attention/context.py`).
  """
  operands = ' '.join(kernel.operands)  # some of them stacks of layers
  keys = re.findall(r'bf16\[(?:\d+,)?\d+,(\d+),\d+\]', operands)
  chunks = whole / queries
  alone = all(int(length) <= queries for length in keys)
  return (1 if alone else chunks - 1) / chunks**2


def rotation(
  kind: str, length: int, heads: int, folder: pathlib.Path
) -> list[float]:
  """Cycles of one token in norm and rotation, forward and backward."""
  width = heads * LANES

  def run(x: Any, scale: Any, cos: Any, sin: Any, dy: Any) -> Any:
    """Forward and backward of norm and rotation in one program."""

    def rotate(x: Any, scale: Any) -> Any:
      """The kernel on packed heads [B, T, N H]."""
      by_head = x.reshape(*x.shape[:2], heads, -1)
      rotated = rope_tpu.normalize_and_rotate(
        by_head, scale, rope.Rotation(cos, sin)
      )
      return rotated.reshape(x.shape)

    y, pull = jax.vjp(rotate, x, scale)
    return y, pull(dy)

  place = jax.sharding.SingleDeviceSharding(device_of(kind))
  half = ((1, length, LANES // 2), jnp.float32)
  row = ((1, length, width), jnp.bfloat16)
  shapes = (row, ((LANES,), jnp.float32), half, half, row)
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype in shapes
  ]
  cycles = kernel_cycles.of_each(kind, run, arguments, folder)
  return [cycles[name] / length for name in ROTATION]


def stream(
  kind: str, length: int, width: int, folder: pathlib.Path
) -> list[float]:
  """Cycles of one token of this width in a block's norm, both passes.

  As long as memory takes for their arrays, where that is longer: one in
  forward, four in backward.
  """
  shape = (1, length, width)
  place = jax.sharding.SingleDeviceSharding(device_of(kind))
  rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
  scale = jax.ShapeDtypeStruct((width,), jnp.float32, sharding=place)
  arguments = rows, rows, rows, scale

  def run(x: Any, d_h: Any, d_stream: Any, scale: Any) -> Any:
    """Both kernels."""
    gradients = norm_tpu.backward(x, d_h, d_stream, scale, 1e-6)
    return norm_tpu.mean_square(x), gradients

  chip = chips.TPUS[kind]
  cycles = kernel_cycles.of_each(kind, run, arguments, folder)

  def each(name: str, arrays: int) -> float:
    """Of one token: computing, or what memory takes for so many arrays."""
    traffic = arrays * width * 2 / chip.bytes_per_cycle
    return max(cycles[name] / length, traffic)

  return [each(MEAN, 1), each(STREAM, 4)]


def _write(flags: argparse.Namespace) -> None:
  folder = pathlib.Path(flags.dumps)
  kind, length = flags.target, flags.length
  line = estimate_ours(kind, flags.gate, length, folder)
  cores = chips.TPUS[kind].cores
  rotations = {
    heads: rotation(kind, length, heads, folder)
    for heads in sorted({int(n) for n in flags.heads.split(',')})
  }
  known: dict[str, Any] = {
    'attention': [cycles / cores for cycles in line.cycles],
    'rotation': rotations,
  }
  if norm_tpu.fits((1, length, flags.width), jnp.bfloat16):
    known['stream'] = stream(kind, length, flags.width, folder)
  if flags.delta:
    known['delta'] = delta_kernels.estimate(kind, flags.delta, length, folder)
  print(json.dumps(known))


def _delta_sizes(text: str) -> delta_kernels.Sizes | None:
  """The sizes that a flag names; None: it is empty."""
  if not text:
    return None
  try:
    sizes = delta_kernels.Sizes(*map(int, text.split(',')))
    if min(sizes) < 1 or sizes.value_heads % sizes.key_heads:
      raise ValueError
  except (TypeError, ValueError):
    raise argparse.ArgumentTypeError(
      f'{text!r} should be key heads, value heads (a multiple) and channels '
      'of each, like 16,32,128,128'
    ) from None
  if sizes.width % LANES or sizes.channels % LANES:
    raise argparse.ArgumentTypeError(
      f'{text!r}: kernels need channels that are a multiple of {LANES}'
    )
  return sizes


def run(arguments: list[str]) -> int:
  """Prints cycles of heads and tokens in each of the kernels."""
  parser = cli.Parser(
    prog='python -m gated_jax.aot.kernels',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--target', default='v5e', choices=TARGETS)
  parser.add_argument('--length', type=cli.count, default=4096)
  parser.add_argument('--gate', default='none', choices=GATES)
  parser.add_argument('--heads', default='16,8')
  parser.add_argument(
    '--width',
    type=cli.count,
    default=2048,
    help="channels of the residual stream: cycles of a token in a norm's "
    'backward, with waiting for memory',
  )
  parser.add_argument(
    '--delta',
    default='',
    type=_delta_sizes,
    help='key heads, value heads and channels of each, like 16,32,128,128: '
    'cycles of a token and value head in the gated delta rule, too, and of a '
    'token and 128 channels in the kernels around it',
  )
  parser.add_argument('--dumps', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args(arguments)
  if flags.dumps:
    _write(flags)
    return 0
  return run_with_dumps('gated_jax.aot.kernels', arguments).returncode


def main(arguments: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  return cli.run(lambda: run(arguments))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
