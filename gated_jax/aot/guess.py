"""A step's time and memory before anything is compiled, roughly.

For ordering what `search.py` compiles, and for leaving out what cannot fit. The
time is that of the model's products and of what is computed again, at a share
of the matrix units' rate, of the bytes that each layer sends, and of packing
rows for experts of other devices. Weights are gathered for each part of a
batch, in forward and in backward, and gradients are summed once for each.
Memory is what a step has to hold at the least: its state, the head's gradient,
the arrays that backward reads, and what it makes of them in one layer.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gated_jax import sharding
from gated_jax.aot.collectives import Collective
from gated_jax.aot.predict import collective_seconds
from gated_jax.aot.topology import chip_of
from gated_jax.config import LayerSpec
from gated_jax.config import RunConfig
from gated_jax.model.accounting import flops_per_token
from gated_jax.model.accounting import parameters
from gated_jax.model.block import SAVED
from gated_jax.ops.moe import ROWS_NAME
from gated_jax.training.parts import step_flops

# The share of the matrix units' rate that whole steps reach where nothing is
# waited for; and the share of weights, gradients and experts' rows under way
# that nothing hides, with sparse cores that carry them and without. These are
# about what docs/tpu.md has for several chips.
RATE = 0.65
EXPOSED = {True: 0.4, False: 0.8}
STATE = 3  # arrays of AdamW's that are as large as the parameters, those too
# How often the rows of experts travel: there and back, in backward there again
# where they were not saved, and their gradients there and back.
TRIPS = 5
# Passes of memory for rows that are packed here and unpacked there, and for
# arrays that no product makes and that are saved nevertheless.
PASSES = 4
SAVES_ROWS = ('none', *(p for p, names in SAVED.items() if ROWS_NAME in names))
# What of forward runs again in backward, for each policy.
AGAIN = {
  'none': (),
  'minimal': (),
  'attention': ('mlp', 'experts'),
  'exchange': ('attention', 'mlp', 'experts'),
  'full': ('attention', 'mlp', 'experts'),
}


@dataclasses.dataclass(frozen=True)
class Guess:
  """What a config's step is taken to need."""

  seconds: float
  memory: float  # bytes of a device, at the least
  tokens: int

  @property
  def tokens_per_second(self) -> float:
    """Tokens of a step over its time."""
    return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Guesser:
  """Guesses for one model on the devices of one pod.

  Attributes:
    devices: of the pod.
    flops: of a step for each token, by part.
    forward: the same of the forward pass alone.
    counts: parameters by part.
  """

  devices: list[Any]
  flops: dict[str, float]
  forward: dict[str, float]
  counts: dict[str, int]

  @classmethod
  def of(cls, base: RunConfig, devices: list[Any]) -> 'Guesser':
    """For configs that have the model and the rows' length of this one."""
    forward = flops_per_token(base.model, base.data.length, trained=())
    return cls(devices, step_flops(base), forward, parameters(base.model))

  def __call__(self, config: RunConfig) -> Guess:
    """Time and memory of a config's step."""
    mesh = sharding.make_mesh(config.mesh, self.devices)
    seconds = self._computing(config, mesh) + self._sending(config, mesh)
    tokens = config.data.batch * config.data.length
    return Guess(seconds, self._memory(config, mesh), tokens)

  def _computing(self, config: RunConfig, mesh: Mesh) -> float:
    again = AGAIN[config.model.remat]
    total = 0.0
    for part, size in self.flops.items():
      # A gate and a mixer's projections are computed with the mixer.
      where = part if part in ('logits', 'mlp', 'experts') else 'attention'
      total += size + (where in again) * self.forward[part]
    tokens = _tokens(config, mesh) / mesh.shape['tensor']
    chip = chip_of(self.devices)
    saved, made = (_saved(config, p) for p in (config.model.remat, 'minimal'))
    copied = max(0, saved - made)
    seconds = total / (RATE * chip.matrix_rate)
    return tokens * (seconds + PASSES * copied / chip.bandwidth)

  def _sending(self, config: RunConfig, mesh: Mesh) -> float:
    model, sizes = config.model, dict(mesh.shape)
    width = jnp.dtype(model.dtype).itemsize
    experts = self.counts.get('experts', 0)
    others = self.counts['total'] - experts
    tensor = sizes['tensor']
    chip = chip_of(self.devices)
    exposed = EXPOSED[chip.sparse_cores]
    total = 0.0
    for size, axes in (
      (others / tensor, ('data', 'fsdp', 'expert', 'context')),
      (experts / tensor / sizes['expert'], ('data', 'fsdp', 'context')),
    ):
      each = 2 * _seconds('all-gather', axes, size * width, mesh)
      each += _seconds('all-reduce', axes, size * width, mesh)
      total += exposed * config.optimizer.accumulate * each
    residual = _tokens(config, mesh) * model.width * width
    # It is gathered before both parts of a layer and summed behind them, in
    # each pass.
    passes = 2 + ('attention' in AGAIN[model.remat])
    each = 2 * 2 * passes * _seconds('all-gather', ('tensor',), residual, mesh)
    total += len(model.layers) * each
    trips = TRIPS - (model.remat in SAVES_ROWS)
    rows = residual * model.moe.top_k * model.moe.slack
    each = exposed * _seconds('all-to-all', ('expert',), rows, mesh)
    if sizes['expert'] > 1:
      each += PASSES * rows / chip.bandwidth
    each *= trips
    return total + sum(layer.ffn == 'moe' for layer in model.layers) * each

  def _memory(self, config: RunConfig, mesh: Mesh) -> float:
    model, tensor = config.model, mesh.shape['tensor']
    state: float = jnp.dtype(model.param_dtype).itemsize * STATE
    state *= self.counts['total'] / mesh.devices.size
    # The loss sums the head's gradient over its chunks in float32.
    head = 4 * model.vocab * model.width / tensor
    width = jnp.dtype(model.dtype).itemsize
    gathered = 0.0  # the experts of one layer
    if experts := self.counts.get('experts', 0):
      layers = sum(layer.ffn == 'moe' for layer in model.layers)
      gathered = width * experts / layers / tensor / mesh.shape['expert']
    made = width * max(_made_by(layer, config) for layer in model.layers)
    tokens = _tokens(config, mesh) / config.optimizer.accumulate / tensor
    held = tokens * (_saved(config, model.remat) + made)
    return state + head + gathered + held


def _tokens(config: RunConfig, mesh: Mesh) -> float:
  """Tokens that a device has of a whole batch; tensor does not split them."""
  split = mesh.devices.size // mesh.shape['tensor']
  return config.data.batch * config.data.length / split


def _seconds(
  kind: str, axes: tuple[str, ...], payload: float, mesh: Mesh
) -> float:
  devices = list(mesh.devices.flat)
  inner = tuple(name for name in axes if mesh.shape[name] > 1)
  size = int(np.prod([mesh.shape[name] for name in inner], dtype=int))
  if size == 1:
    return 0.0
  numbers = np.arange(len(devices)).reshape(mesh.devices.shape)
  names = list(mesh.axis_names)
  last = [names.index(name) for name in inner]
  first = [i for i in range(len(names)) if i not in last]
  groups = numbers.transpose(*first, *last).reshape(-1, size)
  wire = payload * (size - 1) / size * (2 if kind == 'all-reduce' else 1)
  collective = Collective(
    kind, (tuple(groups[0].tolist()),), int(payload), wire, False, 1, '', ''
  )
  return collective_seconds(collective, devices, chip_of(devices))


def _saved(config: RunConfig, remat: str) -> float:
  """Bytes that all layers leave to backward for each token, at the least."""
  model = config.model
  numbers = sum(_saved_by(layer, config, remat) for layer in model.layers)
  return jnp.dtype(model.dtype).itemsize * numbers


def _saved_by(layer: LayerSpec, config: RunConfig, remat: str) -> float:
  """Numbers that a layer leaves to backward for each token, at the least."""
  model = config.model
  numbers: float = model.width  # the layer's input
  if layer.mixer == 'attention':
    heads, kv = (
      layer.heads * layer.head_dim,
      2 * layer.kv_heads * layer.head_dim,
    )
    gate = heads if model.gate.granularity == 'elementwise' else 0
    gate *= model.gate.position != 'none'
    if remat in ('attention', 'minimal', 'none'):
      numbers += 2 * heads + kv + gate
    if remat == 'none':  # before norm and rotation, and after
      numbers += heads + kv // 2 + model.width
  if remat in ('minimal', 'none'):
    numbers += model.width  # between the layer's two parts
  rows = model.moe.top_k * model.moe.slack if layer.ffn == 'moe' else 1
  split = layer.ffn == 'moe' and config.mesh.expert > 1
  if remat in ('minimal', 'none'):
    numbers += rows * 2 * layer.ffn_width
  if split and remat in SAVES_ROWS:
    numbers += rows * model.width
  if remat == 'none':
    # The norm's output, what `down` multiplies, and what the activation's rule
    # keeps; and rows as they are packed and as they leave the experts.
    numbers += model.width + 2 * rows * layer.ffn_width
    if layer.ffn == 'moe' and not split:
      numbers += 2 * rows * model.width
  return numbers


def _made_by(layer: LayerSpec, config: RunConfig) -> float:
  """Numbers for each token that backward of a layer holds, at the least.

  The gradient of the MLP's first product, and that of packed rows; where the
  policy does not save them, the product and the rows as well.
  """
  model = config.model
  experts = layer.ffn == 'moe'
  rows = model.moe.top_k if experts else 1
  numbers = rows * (2 * layer.ffn_width + experts * model.width)
  part = 'experts' if experts else 'mlp'
  return numbers * (2 if part in AGAIN[model.remat] else 1)
