"""What happens inside a trained model: sinks, gates, large activations.

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
  has one score per kv head.
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
  attention_logit: np.ndarray = dataclasses.field(
    default_factory=_none
  )  # [L] largest one

  @property
  def sink_heads(self) -> np.ndarray:
    """Share of each layer's heads that are sinks, [L]."""
    return np.mean(self.first_token > SINK, axis=1)

  @property
  def near_sink_heads(self) -> np.ndarray:
    """The same over the first probes.NEAR tokens of each document, [L]."""
    return np.mean(self.near_first_token > SINK, axis=1)

  def from_layer(self, layer: int) -> 'Report':
    """The same without the layers before this one.

    Layers 0 and 1 never become sink layers (arXiv 2606.02378), so that
    leaving them out of a mean makes models of different depth comparable.
    """
    rest = {
      field.name: getattr(self, field.name)[layer:]
      for field in dataclasses.fields(self)
      if field.name != 'maps'
    }
    maps = {i - layer: x for i, x in self.maps.items() if i >= layer}
    return Report(**rest, maps=maps)

  def scalars(self) -> dict[str, float]:
    """Flat names and numbers, for logs."""
    scalars: dict[str, float] = {}
    for name, table, parts in (
      ('sink', self.first_token, 'mean max layers'),
      (f'sink/heads_above_{SINK}', self.sink_heads, 'only layers'),
      (f'sink_{NEAR}', self.near_first_token, 'mean'),
      (f'sink_{NEAR}/heads_above_{SINK}', self.near_sink_heads, 'only'),
      ('activation', self.activation, 'mean max layers'),
      ('attention_logit', self.attention_logit, 'max layers'),
      # A largest layer of the mean gate would hide that larger scores exist.
      ('gate', self.gate_mean, 'mean layers'),
      ('gate/below_0.1', self.gate_below, 'only'),
      ('gate/logit_norm', self.gate_norm, 'only'),
    ):
      if not len(table):
        continue
      layers = table.reshape(len(table), -1).mean(axis=1)
      if 'only' in parts:
        scalars[name] = float(layers.mean())
      if 'mean' in parts:
        scalars[f'{name}/mean'] = float(layers.mean())
      if 'max' in parts:
        scalars[f'{name}/max'] = float(layers.max())
      if 'layers' in parts:
        for layer, value in enumerate(layers):
          scalars[f'{name}/layer_{layer:02d}'] = float(value)
    if len(self.first_token):
      scalars['sink/max_head'] = float(self.first_token.max())
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
      field.name: _rounded(getattr(self, field.name)).tolist()
      for field in dataclasses.fields(self)
      if field.name != 'maps'
    }


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
  first = None
  for batch in batches:
    first = batch if first is None else first
    found = jax.tree.map(
      lambda x: np.asarray(x, np.float64),
      by_layer(model.config, _run(model, params, batch, 'probes')),
    )
    for name, value in found.items():
      join = np.maximum if name in (RESIDUAL, LOGIT) else np.add
      old = sums.get(name)
      sums[name] = value if old is None else jax.tree.map(join, old, value)
  if first is None:
    raise ValueError('no batches to look at')
  short = {name: x[:, :MAP_LENGTH] for name, x in first.items()}
  return _divide(sums, attention_maps(model, params, short))


def by_layer(config: ModelConfig, probes: Mapping[str, Any]) -> dict[str, Any]:
  """Each probe with one leading axis of layers, in the order they run.

  A layer that does not sow a probe has no entry in it.

  Args:
    config: of the model that sowed them.
    probes: the collection.
  """
  groups: dict[str, list[Any]] = collections.defaultdict(list)
  for layer in range(config.depth):
    for name, value in _sown(tree.subtree(probes, config, layer)):
      groups[name].append(value)
  return {
    name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    for name, values in groups.items()
  }


_PROBES = (
  FIRST_TOKEN,
  NEAR_FIRST_TOKEN,
  LOGIT,
  SCORES,
  NORM,
  RESIDUAL,
  WEIGHTS,
)


def _sown(subtree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """(name, value) of every known probe in a layer."""
  for key, value in subtree.items():
    if isinstance(value, Mapping):
      yield from _sown(value)
    elif key in _PROBES:
      # sow keeps a tuple of what it was given; a probe is a named one.
      plain = type(value) is tuple
      yield key, value[-1] if plain else value


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(
  model: Decoder, params: Any, batch: dict[str, Any], collection: str
) -> Mapping[str, Any]:
  """What the model sows into a collection."""
  _, state = model.apply(
    {'params': params},
    batch,
    method='loss',
    deterministic=True,
    mutable=[collection],
  )
  return state.get(collection, {})


def _divide(sums: dict[str, Any], maps: Mapping[int, np.ndarray]) -> Report:
  def mean(name: str) -> np.ndarray:
    if name not in sums:
      return _none()
    total, number = sums[name].total, sums[name].number
    return total / np.maximum(number, 1)[:, None]

  below, histogram = _none(), np.zeros((0, BINS))
  if SCORES in sums:
    scores = sums[SCORES]
    number = np.maximum(scores.number, 1)[:, None]
    below = scores.below / number
    histogram = scores.histogram.sum(axis=1)
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
  found = by_layer(model.config, sown).get(WEIGHTS)
  if found is None:
    return {}
  depth = len(found)
  if not layers:
    few = np.linspace(0, depth - 1, min(depth, 4)).round()
    layers = [int(i) for i in few]
  return {i % depth: np.asarray(found[i][0], np.float32) for i in layers}
