"""Measures inside a trained model: sinks, gates, large activations.

The model sows sums of `ops/probes.py` into the collection `probes`; here they
are added up over batches and divided once. Definitions are the paper's
(arXiv 2505.06708, section 4 and Table 4):

    F-Attn      attention on a document's first token, mean over queries,
                heads and layers
    M-Act       largest |activation| of a layer's output, mean over layers
    mean gate   of the scores after the activation
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gated_jax.config import ModelConfig
from gated_jax.model import tree
from gated_jax.model.decoder import Decoder
from gated_jax.ops.probes import BINS
from gated_jax.ops.probes import NEAR

# Names in the collection `probes`.
FIRST_TOKEN = 'first_token'
NEAR_FIRST_TOKEN = 'first_token_near'
LOGIT = 'attention_logit_max'
SCORES = 'gate_scores'
NORM = 'gate_logit_norm'
RESIDUAL = 'residual_max'
WEIGHTS = 'attention_weights'
# Attention maps show this many positions of one row.
MAP_LENGTH = 96
# A head that gives its first token more than this is a sink head, after Gu et
# al. (arXiv 2410.10781), who count them in texts of 64 tokens.
SINK = 0.3


def _none() -> np.ndarray:
  """Stands where no layer has anything of the kind."""
  return np.zeros((0, 0))


@dataclasses.dataclass(frozen=True)
class Report:
  """Figures by layer, first layer first.

  Arrays have no rows where a model has nothing of the kind (no gate, say).
  Heads may differ in number from one array to the next: a gate on the values
  has one score per kv head. Where they differ from layer to layer, NaN stands
  for those that a layer lacks.
  """

  first_token: np.ndarray  # [L, N] mean probability on the first token
  activation: np.ndarray  # [L] largest |activation| of the residual stream
  gate_mean: np.ndarray  # [L, N] mean score
  gate_below: np.ndarray  # [L, N] share of scores below 0.1
  gate_histogram: np.ndarray  # [L, bins] shares, see ops/probes.py EDGES
  gate_norm: np.ndarray  # [L, N] mean length of a head's logits
  maps: Mapping[int, np.ndarray]  # layer -> attention weights [N, T, T]
  # [L, N] first_token over the first probes.NEAR tokens of each document
  near_first_token: np.ndarray = dataclasses.field(default_factory=_none)
  # [L] largest logit
  attention_logit: np.ndarray = dataclasses.field(default_factory=_none)
  # Numbers of the layers that the rows above are of; (): of all, in order.
  attention_layers: tuple[int, ...] = ()
  gate_layers: tuple[int, ...] = ()
  # Scalars that mixers sow under names of their own: name -> layer -> value,
  # the largest over batches.
  own: Mapping[str, Mapping[int, float]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def sink_heads(self) -> np.ndarray:
    """Share of each layer's heads that are sinks, [L]."""
    return _share_above(self.first_token, SINK)

  @property
  def near_sink_heads(self) -> np.ndarray:
    """The same over the first probes.NEAR tokens of each document, [L]."""
    return _share_above(self.near_first_token, SINK)

  def from_layer(self, layer: int) -> 'Report':
    """The same without the layers before this one.

    Layers 0 and 1 never become sink layers (arXiv 2606.02378), so that
    leaving them out of a mean makes models of different depth comparable.
    """

    def rest(numbers: tuple[int, ...]) -> tuple[int, ...]:
      """Numbers of layers, counted from this layer on."""
      return tuple(number - layer for number in numbers if number >= layer)

    tables = {}
    for name, numbers in self._tables().items():
      table = getattr(self, name)
      rows = [n >= layer for n in numbers or range(len(table))]
      tables[name] = table[rows] if len(table) else table
    return Report(
      **tables,
      maps={i - layer: x for i, x in self.maps.items() if i >= layer},
      attention_layers=rest(self.attention_layers),
      gate_layers=rest(self.gate_layers),
    )

  def _tables(self) -> dict[str, tuple[int, ...]]:
    """Names of the arrays, and the numbers of the layers of their rows."""
    attention = ('first_token', 'near_first_token', 'attention_logit')
    gate = ('gate_mean', 'gate_below', 'gate_histogram', 'gate_norm')
    return (
      {'activation': ()}
      | dict.fromkeys(attention, self.attention_layers)
      | dict.fromkeys(gate, self.gate_layers)
    )

  def scalars(self) -> dict[str, float]:
    """Flat names and numbers, for logs."""
    scalars: dict[str, float] = {}
    attention, gate = self.attention_layers, self.gate_layers
    for name, table, parts, numbers in (
      ('sink', self.first_token, 'mean max layers', attention),
      (f'sink/heads_above_{SINK}', self.sink_heads, 'only layers', attention),
      (f'sink_{NEAR}', self.near_first_token, 'mean', attention),
      (f'sink_{NEAR}/heads_above_{SINK}', self.near_sink_heads, 'only', ()),
      ('activation', self.activation, 'mean max layers', ()),
      ('attention_logit', self.attention_logit, 'max layers', attention),
      # A largest layer of the mean gate would hide that larger scores exist.
      ('gate', self.gate_mean, 'mean layers', gate),
      ('gate/below_0.1', self.gate_below, 'only', gate),
      ('gate/logit_norm', self.gate_norm, 'only', gate),
    ):
      if not len(table):
        continue
      layers = np.nanmean(table.reshape(len(table), -1), axis=1)
      if 'only' in parts:
        scalars[name] = float(layers.mean())
      if 'mean' in parts:
        scalars[f'{name}/mean'] = float(layers.mean())
      if 'max' in parts:
        scalars[f'{name}/max'] = float(layers.max())
      if 'layers' in parts:
        for layer, value in zip(
          numbers or range(len(layers)), layers, strict=True
        ):
          scalars[f'{name}/layer_{layer:02d}'] = float(value)
    if len(self.first_token):
      scalars['sink/max_head'] = float(np.nanmax(self.first_token))
    for name, values in self.own.items():
      for layer, value in values.items():
        scalars[f'{name}/layer_{layer:02d}'] = value
    return scalars

  def summary(self) -> list[tuple[str, float, str]]:
    """(name, value, format) of what Table 4 prints."""
    scalars = self.scalars()
    rows = [
      ('first-token attention', 'sink/mean', '{:.4f}'),
      (f'heads above {SINK}', f'sink/heads_above_{SINK}', '{:.1%}'),
      ('largest activation', 'activation/max', '{:.2f}'),
      ('mean of layers', 'activation/mean', '{:.2f}'),
      ('largest attention logit', 'attention_logit/max', '{:.2f}'),
      ('mean gate', 'gate/mean', '{:.4f}'),
      ('gates below 0.1', 'gate/below_0.1', '{:.1%}'),
    ]
    return [(n, scalars.get(k, math.nan), f) for n, k, f in rows]

  def arrays(self) -> dict[str, list[Any]]:
    """All but the maps as nested lists, four digits each, for JSON."""
    return {
      name: _rounded(getattr(self, name)).tolist() for name in self._tables()
    }


def _share_above(heads: np.ndarray, bound: float) -> np.ndarray:
  """The share of each layer's heads above a bound; NaN is no head."""
  above = np.where(np.isnan(heads), np.nan, heads > bound)
  return np.nanmean(above, axis=1)


def _rounded(values: np.ndarray) -> np.ndarray:
  """Values with four significant digits; None for what is no number."""
  flat = [
    float(f'{x:.4g}') if math.isfinite(x) else None for x in values.ravel()
  ]
  return np.array(flat, object).reshape(values.shape)


def probe(
  model: Decoder, params: Any, batches: Iterable[dict[str, Any]]
) -> Report:
  """Runs the model over batches and reports what it did.

  Args:
    model: sows probes in its method `loss`.
    params: its parameters.
    batches: tokens, targets, segments, positions and weights, [B, T] each.
  """
  sums: dict[str, Any] = {}
  layers: dict[str, tuple[int, ...]] = {}
  first = None
  for batch in batches:
    first = batch if first is None else first
    sown = by_layer(model.config, _run(model, params, batch, 'probes'))
    for name, probe in sown.items():
      value = jax.tree.map(lambda x: np.asarray(x, np.float64), probe.value)
      join = np.add if name in _SUMS else np.maximum
      old = sums.get(name)
      sums[name] = value if old is None else jax.tree.map(join, old, value)
      layers[name] = probe.layers
  if first is None:
    raise ValueError('no batches to look at')
  short = {name: x[:, :MAP_LENGTH] for name, x in first.items()}
  return _divide(sums, layers, attention_maps(model, params, short))


class Sown(NamedTuple):
  """One probe of all layers that sow it."""

  layers: tuple[int, ...]  # their numbers
  value: Any  # its arrays, with a leading axis of these layers


def by_layer(config: ModelConfig, probes: Mapping[str, Any]) -> dict[str, Sown]:
  """Every probe, in the order in which layers run.

  Probes of unknown names are kept if they are scalars.

  Args:
    config: of the model that sowed them.
    probes: the collection.
  """
  groups: dict[str, dict[int, Any]] = collections.defaultdict(dict)
  for layer in range(config.depth):
    for name, value in _sown(tree.subtree(probes, config, layer)):
      groups[name][layer] = value
  return {
    name: Sown(tuple(values), jax.tree.map(_stack, *values.values()))
    for name, values in groups.items()
  }


def _stack(*leaves: Any) -> Any:
  """Arrays of several layers as one; NaN where one has fewer heads."""
  shapes = {x.shape for x in leaves}
  if len(shapes) == 1:
    return jnp.stack(leaves)
  largest = [max(sizes) for sizes in zip(*shapes, strict=True)]

  def padded(x: Any) -> Any:
    """Filled with NaN to the largest shape."""
    missing = zip(x.shape, largest, strict=True)
    widths = [(0, most - size) for size, most in missing]
    return jnp.pad(x, widths, constant_values=jnp.nan)

  return jnp.stack([padded(x) for x in leaves])


# Probes that batches add to; of the others the largest is kept.
_SUMS = (FIRST_TOKEN, NEAR_FIRST_TOKEN, SCORES, NORM)
_KNOWN = (*_SUMS, LOGIT, RESIDUAL, WEIGHTS)


def _sown(subtree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """(name, value) of every probe in a layer."""
  for key, value in subtree.items():
    if isinstance(value, Mapping):
      yield from _sown(value)
      continue
    # sow keeps a tuple of what it was given; a probe is a named one.
    value = value[-1] if type(value) is tuple else value
    if key in _KNOWN or jnp.ndim(value) == 0:
      yield key, value


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(
  model: Decoder, params: Any, batch: dict[str, Any], collection: str
) -> Mapping[str, Any]:
  """The arrays that the model sows into a collection."""
  _, state = model.apply(
    {'params': params},
    batch,
    method='loss',
    deterministic=True,
    mutable=[collection],
  )
  return state.get(collection, {})


def _divide(
  sums: dict[str, Any],
  layers: dict[str, tuple[int, ...]],
  maps: Mapping[int, np.ndarray],
) -> Report:
  def mean(name: str) -> np.ndarray:
    """Sums over tokens divided by their number, by layer."""
    if name not in sums:
      return _none()
    total, number = sums[name].total, sums[name].number
    return total / np.maximum(number, 1)[:, None]

  below, histogram = _none(), np.zeros((0, BINS))
  if SCORES in sums:
    scores = sums[SCORES]
    number = np.maximum(scores.number, 1)[:, None]
    below = scores.below / number
    histogram = np.nansum(scores.histogram, axis=1)
    histogram = histogram / np.maximum(histogram.sum(-1, keepdims=True), 1)
  return Report(
    first_token=mean(FIRST_TOKEN),
    activation=sums.get(RESIDUAL, np.zeros(0)),
    gate_mean=mean(SCORES),
    gate_below=below,
    gate_histogram=histogram,
    gate_norm=mean(NORM),
    maps=maps,
    near_first_token=mean(NEAR_FIRST_TOKEN),
    attention_logit=sums.get(LOGIT, np.zeros(0)),
    attention_layers=layers.get(FIRST_TOKEN, ()),
    gate_layers=layers.get(SCORES, ()),
    own={
      name: dict(zip(layers[name], map(float, value), strict=True))
      for name, value in sums.items()
      if name not in _KNOWN
    },
  )


def attention_maps(
  model: Decoder,
  params: Any,
  batch: dict[str, Any],
  layers: Sequence[int] = (),
) -> dict[int, np.ndarray]:
  """All attention weights [N, T, T] of the batch's first row, for figures.

  Args:
    model: sows them where the collection `attention_maps` is mutable.
    params: its parameters.
    batch: a short one: the result grows with the square of its length.
    layers: which ones, negative from the end; (): a few over the depth.
  """
  sown = _run(model, params, batch, 'attention_maps')
  values = {
    layer: value
    for layer in range(model.config.depth)
    for name, value in _sown(tree.subtree(sown, model.config, layer))
    if name == WEIGHTS
  }
  if not values:
    return {}
  numbers = list(values)
  if not layers:
    few = np.linspace(0, len(numbers) - 1, min(len(numbers), 4)).round()
    layers = [numbers[int(i)] for i in few]
  chosen = [layer % model.config.depth for layer in layers]
  return {i: np.asarray(values[i][0], np.float32) for i in chosen}
