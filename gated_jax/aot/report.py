"""The figures of a config on a pod, and how they are printed."""

import dataclasses
import re
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax

from gated_jax.aot.compile import Compiled
from gated_jax.aot.compile import compile_step
from gated_jax.aot.compile import shard_bytes
from gated_jax.aot.predict import Prediction
from gated_jax.aot.predict import Traffic
from gated_jax.aot.predict import predict
from gated_jax.aot.program import Kernel
from gated_jax.aot.program import Program
from gated_jax.aot.topology import chip_of
from gated_jax.chips import GIB
from gated_jax.chips import Tpu
from gated_jax.config import RunConfig
from gated_jax.model.accounting import flops_per_token
from gated_jax.training.parts import step_flops

CAVEAT = (
  'The TPU compiler estimated every figure below. Nothing was run or measured.'
)


class DoesNotFit(ValueError):
  """The program needs more memory than the chip has."""


@dataclasses.dataclass(frozen=True)
class Report:
  """One config on one pod."""

  compiled: Compiled
  program: Program
  prediction: Prediction
  chip: Tpu
  flops: dict[str, float]  # the model's, per token, by part

  @property
  def tokens(self) -> int:
    """Tokens of one step."""
    data = self.compiled.config.data
    return data.batch * data.length

  @property
  def devices(self) -> int:
    """Devices of the pod."""
    return self.compiled.mesh.devices.size

  @property
  def tokens_per_second(self) -> float:
    """Tokens of a step over its predicted time."""
    return self.tokens / self.prediction.total

  @property
  def utilisation(self) -> float:
    """Model FLOPs over what the matrix units could have done."""
    model = sum(self.flops.values()) * self.tokens_per_second
    return model / (self.chip.matrix_rate * self.devices)

  @property
  def excess(self) -> float:
    """Bytes by which the program is larger than the chip's memory."""
    return self.compiled.memory.peak - self.chip.memory


def examine(
  config: RunConfig,
  devices: list[Any],
  price: Callable[[Kernel], float | None] = lambda kernel: None,
  train: bool = True,
) -> Report:
  """Compiles a config's train step and reads what came out.

  Args:
    config: every setting.
    devices: of a topology.
    price: cycles of one call of a kernel, from `kernels.prices`; without
      it, or where it knows none, a kernel counts by its declared FLOPs.
    train: False: evaluation in place of the step.

  Raises:
    DoesNotFit: the compiler found no way to place it in memory. A program
      that it did compile may be too large as well: see `Report.excess`.
    ValueError: the config does not suit the devices.
  """
  chip = chip_of(devices)
  try:
    compiled = compile_step(config, devices, train)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(_explain(str(error), chip)) from None
  program = Program(compiled.text)
  if train:
    flops = step_flops(config)
  else:
    flops = flops_per_token(config.model, config.data.length, trained=())
  return Report(
    compiled,
    program,
    predict(program, compiled.mesh, chip, price),
    chip,
    flops,
  )


def _explain(message: str, chip: Tpu) -> str:
  """The compiler's page about one of its memories, in one line."""
  # Not the memory that a smaller batch would leave free.
  if 'vmem' in message.lower():
    where = ' '.join(message.split())
    return f'a kernel or fusion overruns the VMEM of {chip.name}: {where[:600]}'
  sizes = [float(n) for n in re.findall(r'\b(\d+\.\d+)G\b', message)]
  if not sizes or max(sizes) <= chip.memory / GIB:
    return f'it does not fit: {message.splitlines()[0][:300]}'
  need = max(sizes)
  return (
    f'it does not fit: {need:.2f} GiB needed per device, '
    f'{chip.memory / GIB:.2f} GiB on {chip.name}, '
    f'{need - chip.memory / GIB:.2f} GiB too much'
  )


def replicated(state: Any, least: int) -> list[tuple[str, int]]:
  """Arrays of at least that many bytes which every device holds whole."""
  arrays = []
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    size = shard_bytes(x)
    if size >= least and x.sharding.is_fully_replicated:
      arrays.append((jax.tree_util.keystr(path), size))
  return sorted(arrays, key=lambda pair: -pair[1])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
  """Columns as wide as they need be: the first to the left, others right."""
  widths = [max(len(cell) for cell in column) for column in zip(*rows)]  # noqa: B905
  return '\n'.join(
    '  '
    + '  '.join(
      cell.ljust(w) if k == 0 else cell.rjust(w)
      for k, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )


def _gib(size: float) -> str:
  return f'{size / GIB:.2f} GiB'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:.2f} ms'


def _memory(report: Report) -> str:
  memory = report.compiled.memory
  rows = [
    ('parameters', _gib(memory.parameters)),
    ('optimizer', _gib(memory.optimizer)),
    ('batch', _gib(memory.batch)),
    ('activations, gradients, temporaries', _gib(memory.activations)),
    ('peak', _gib(memory.peak)),
    (f'{report.chip.name} has', _gib(report.chip.memory)),
  ]
  return f'memory per device\n{_table(rows)}'


def _flops(report: Report) -> str:
  total = sum(report.flops.values())
  gate = report.flops.get('gate', 0.0)
  kernels = sum(k.flops * k.calls for k in report.program.kernels())
  rows = [
    ('model', f'{total * report.tokens:.3e}'),
    ('  of which the gate', f'{100 * gate / total:.2f} %'),
    (
      'compiled, all devices, recomputation included',
      f'{(report.program.flops + kernels) * report.devices:.3e}',
    ),
  ]
  return f'FLOPs per step\n{_table(rows)}'


def _collectives(report: Report) -> str:
  traffic = report.prediction.traffic
  rows = [('kind', 'mesh axes', 'calls', 'bytes', 'time', '')]
  for t in traffic:
    how = _waiting(t)
    axes = '+'.join(t.axes) or '-'
    rows.append(
      (t.kind, axes, f'{t.calls}', _gib(t.payload), _ms(t.seconds), how)
    )
  return 'collectives per device and step\n' + (
    _table(rows) if traffic else '  none'
  )


def _waiting(t: Traffic) -> str:
  """Tells whether such collectives are waited for."""
  if not t.asynchronous:
    return 'waited for'
  if not t.exposed:
    return 'beside computing'
  return f'beside computing, {_ms(t.exposed)} waited for'


# How the time of a kernel was found; see predict.py.
_BOUNDS = {
  'schedule': 'by its schedule',
  'matrix units': 'matrix-unit bound, a floor',
  'memory': 'by its bytes, a floor',
  '': 'unknown, not counted',
}


def _kernels(report: Report) -> str:
  kernels = report.prediction.kernels
  rows = [('name', 'calls', 'time', '')]
  for k in kernels:
    how = _BOUNDS[k.bound]
    rows.append((k.kernel.name, f'{k.kernel.calls}', _ms(k.seconds), how))
  return 'kernels per device and step\n' + (
    _table(rows) if kernels else '  none'
  )


def _time(report: Report) -> str:
  p, program, chip = report.prediction, report.program, report.chip
  hidden = min(p.asynchronous, p.xla + p.kernel)
  rows = [
    (f'XLA: {name}', _ms(cycles / chip.clock))
    for name, cycles in program.cycles_by_kind().items()
    if cycles
  ]
  rows += [
    ('kernels', _ms(p.kernel)),
    ('collectives waited for', _ms(p.synchronous)),
    ('collectives beside computing', _ms(p.asynchronous)),
    ('  of that hidden', _ms(-hidden)),
    ('step', _ms(p.total)),
    ('tokens per second', f'{report.tokens_per_second:,.0f}'),
    ('implied MFU', f'{100 * report.utilisation:.1f} %'),
  ]
  notes = ''
  for loop in program.loops:
    if not loop.known:
      counted = 'counted once' if loop.trips else 'not counted'
      notes += f'\n  {counted}, its trips depend on data: {loop.op_name}'
  missing = program.without_estimate()
  if missing:
    most = sorted(missing.items(), key=lambda item: -item[1])[:6]
    notes += '\n  without an estimate, not counted: ' + ', '.join(
      f'{name} x{n}' for name, n in most
    )
  loops = [
    f'{loop.trips} x {loop.cycles / chip.clock * 1e3:.2f} ms'
    for loop in program.loops
    if loop.known and loop.cycles * loop.trips * 20 > program.cycles
  ]
  if loops:
    notes += f'\n  loops: {", ".join(loops)}'
  return f'predicted time\n{_table(rows)}{notes}'


def describe(report: Report, topology: str) -> str:
  """The whole report as text."""
  config = report.compiled.config
  axes = ' x '.join(f'{k} {v}' for k, v in report.compiled.mesh.shape.items())
  head = (
    f'{topology}: {report.devices} devices, {axes}\n'
    f'{config.data.batch} sequences of {config.data.length} per step, '
    f'attention {config.model.attention}, remat {config.model.remat}\n'
    f'{CAVEAT}'
  )
  parts = [_memory, _flops, _collectives, _kernels, _time]
  text = [head, *(part(report) for part in parts), verdict(report)]
  return '\n\n'.join(text)


def verdict(report: Report) -> str:
  """A line that says if it fits, and by how much."""
  word = 'does not fit' if report.excess > 0 else 'fits'
  left = 'too much' if report.excess > 0 else 'left'
  return (
    f'it {word}: {_gib(report.compiled.memory.peak)} of '
    f'{_gib(report.chip.memory)}, {_gib(abs(report.excess))} {left}'
  )
