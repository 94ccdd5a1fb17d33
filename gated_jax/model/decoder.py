"""The language model: embedding, layers, norm, logits.

    x += attention(norm(x))      x += mlp(norm(x))      logits = norm(x) W

Layers are scanned: one is compiled, its parameters are stacked along a first
axis. Where `config.windows` is a pattern, the whole pattern is scanned.

What backward recomputes is `config.remat`; arrays are saved by name:

    none       nothing is recomputed
    minimal    norms and products only: every matmul's output is saved
    attention  the MLP as well: what attention reads and writes is saved
    full       everything but the inputs of the layers

Read `attention.py` and `gate.py` for what this project is about.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.model.attention import KV
from gated_jax.model.attention import GatedAttention
from gated_jax.model.attention import Surroundings
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.layers import MEAN_NAME
from gated_jax.model.layers import MLP
from gated_jax.model.layers import Embed
from gated_jax.model.layers import Unembed
from gated_jax.model.layers import norm
from gated_jax.model.moe import MoE
from gated_jax.ops import loss as losses
from gated_jax.ops import probes
from gated_jax.ops import rope
from gated_jax.ops.attention import context
from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME

GATED = (LOGITS_NAME, OUTPUT_NAME, LSE_NAME)
# What each policy saves; 'none' is no policy at all.
SAVED: dict[str, tuple[str, ...]] = {
  'full': (),
  'attention': ('query', 'key', 'value', *GATED, MEAN_NAME),
  'minimal': (
    'query_projection',
    'key_projection',
    'value_projection',
    *GATED,
    'attention_result',
    'mlp_gate',
    'mlp_up',
    MEAN_NAME,
  ),
}


class Loss(NamedTuple):
  """Of a batch; means go over tokens by their weight."""

  total: Float[Array, '']  # what is minimised
  nll: Float[Array, '']  # nats
  weight: Float[Array, '']  # sum of the weights
  metrics: dict[str, Array]


class Cache(NamedTuple):
  """Keys and values of all layers, and how many tokens each row has."""

  layers: Any  # KV stacked as the parameters are, or one for each layer
  length: Int[Array, ' B']


@struct.dataclass
class Call:
  """What all layers of one call share."""

  around: Surroundings
  valid: Array | None
  deterministic: bool = struct.field(pytree_node=False)


class Layer(nn.Module):
  """Attention, then MLP or experts."""

  config: ModelConfig
  window: int

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], cache: KV | None, call: Call
  ) -> tuple[Array, tuple[KV | None, dict[str, dict[str, Array]]]]:
    c = self.config
    around = call.around
    if not (c.global_rope or self.window):
      around = around._replace(rotation=None)
    y = self._attention()(
      norm(c, 'attention_norm')(x),
      around=around,
      cache=cache,
      deterministic=call.deterministic,
    )
    if cache is not None:
      y, cache = y
    x = self._add(x, y, 'attention_post_norm', call)
    x = checkpoint_name(x, 'attention_result')
    h = norm(c, 'mlp_norm')(x)
    extras: dict[str, dict[str, Array]] = {'losses': {}, 'logs': {}}
    if c.moe.experts:
      y, *found = MoE(c, name='moe')(h, call.valid)
      extras = dict(zip(extras, found, strict=True))
    else:
      y = MLP(c, c.mlp_width, name='mlp')(h)
    x = self._add(x, y, 'mlp_post_norm', call)
    if self.is_mutable_collection('probes') and not self.is_initializing():
      valid = call.valid
      valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
      largest = probes.largest_activation(x, valid)
      self.sow('probes', 'residual_max', largest)
    return x, (cache, extras)

  def _add(self, x: Array, y: Array, name: str, call: Call) -> Array:
    """x plus what a block makes of it."""
    c = self.config
    if c.norm == 'sandwich':
      y = norm(c, name)(y)
    if c.dropout:
      y = nn.Dropout(c.dropout, deterministic=call.deterministic)(y)
    return sharding.constrain(x + y.astype(x.dtype), *sharding.RESIDUAL)

  def _attention(self) -> GatedAttention:
    c = self.config
    return GatedAttention(
      num_heads=c.heads,
      num_kv_heads=c.kv_heads,
      qkv_features=c.heads * c.head_dim,
      gate=c.gate,
      causal=True,
      window=self.window,
      dropout_rate=c.dropout,
      qk_norm=c.qk_norm,
      norm_eps=c.norm_eps,
      norm_zero_centered=c.norm_zero_centered,
      init_std=c.init_std,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      implementation=c.attention,
      name='attention',
    )


class Pattern(nn.Module):
  """As many layers as the windows' pattern is long."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], caches: Any, call: Call
  ) -> tuple[Array, Any]:
    found = []
    for i, window in enumerate(self.config.windows):
      cache = None if caches is None else caches[i]
      layer = _remat(Layer, self.config)(self.config, window, name=f'block_{i}')
      x, out = layer(x, cache, call)
      found.append(out)
    caches, extras = zip(*found, strict=True)
    extras = jax.tree.map(lambda *each: jnp.stack(each), *extras)
    return x, (None if caches[0] is None else caches, extras)


def _remat(layer: type[nn.Module], config: ModelConfig) -> Any:
  if config.remat == 'none':
    return layer
  policy = jax.checkpoint_policies.save_only_these_names(*SAVED[config.remat])
  # A scan keeps backward apart from forward by itself.
  return nn.remat(layer, policy=policy, prevent_cse=not config.scan)


class Decoder(nn.Module):
  """Tokens to logits; `loss` for training; a cache, passed in and returned."""

  config: ModelConfig

  def setup(self):
    c = self.config
    self.embed = Embed(c)
    if c.scan:
      single = len(c.windows) == 1
      repeated: Any = nn.scan(
        _remat(Layer, c) if single else Pattern,
        variable_axes={'params': 0, 'probes': 0, 'attention_maps': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast),
        length=c.depth // len(c.windows),
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      self.layers = repeated(c, c.windows[0]) if single else repeated(c)
    else:
      self.layers = [
        _remat(Layer, c)(c, c.windows[i % len(c.windows)])
        for i in range(c.depth)
      ]
    self.final_norm = norm(c)
    if not c.tie_embeddings:
      self.unembed = Unembed(c)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    segments: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    cache: Cache | None = None,
    deterministic: bool = True,
    last: bool = False,
    skip_below: Float[Array, ''] | None = None,
  ) -> Any:
    """Logits of the next token at every position.

    Args:
      tokens: ids below config.vocab.
      segments: document numbers; 0 is padding. Queries see their own
        document. With a cache they only say which tokens are none.
      positions: of each token in its document; None: in its row.
      cache: from `init_cache` or an earlier call; its tokens come before
        these. Padding has to be at the end of a row.
      deterministic: no dropout.
      last: only of each row's last token that is no padding: T is 1.
      skip_below: leaves heads out whose gate scores are all below it; see
        `gated_jax/ops/attention/decode.py`.

    Returns:
      [B, T, V] float32, and with a cache the pair of that and the cache that
      holds these tokens too.
    """
    inputs = {'tokens': tokens, 'segments': segments, 'positions': positions}
    order = self._order(tokens.shape[1], cache)
    x, cache, _ = self._hidden(
      _permute(inputs, order), cache, deterministic, skip_below
    )
    if last:
      x = x if order is None else x[:, jnp.argsort(order)]
      x, order = _last_token(x, segments), None
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum(
      'BTD,VD->BTV' if self.config.tie_embeddings else 'BTD,DV->BTV',
      x,
      self._matrix().astype(x.dtype),
      preferred_element_type=wide,
    )
    logits = sharding.constrain(logits, 'batch', 'length', 'vocab')
    if order is not None:
      logits = logits[:, jnp.argsort(order)]
    return logits if cache is None else (logits, cache)

  def loss(self, batch: dict[str, Any], *, deterministic: bool = False) -> Loss:
    """Mean loss of packed rows.

    Args:
      batch: tokens, targets, segments, positions (int32) and weights
        (float32), each [B, T]. Without segments a row is one document,
        without positions they count from its beginning.
      deterministic: no dropout.
    """
    c = self.config
    batch = _permute(batch, self._order(batch['tokens'].shape[1], None))
    x, _, extras = self._hidden(batch, None, deterministic)
    found = self._cross_entropy(x, batch['targets'], batch['weights'])
    # Of each layer one value: their mean, so that depth changes no balance.
    extras = jax.tree.map(jnp.mean, extras)
    total = sum(extras['losses'].values(), found.total)
    metrics = {f'moe/{name}': x for name, x in extras['logs'].items()}
    if c.z_loss:
      metrics['z'] = found.z
    return Loss(total, found.nll, found.weight, metrics)

  def _order(self, length: int, cache: Cache | None) -> Any:
    """Positions in the order that splits them over devices; None: as is."""
    parts = sharding.axis_size('length')
    if parts == 1:
      return None
    if cache is not None:
      raise ValueError(
        f'decoding with a cache needs a context axis of 1, not {parts}'
      )
    return jnp.asarray(context.zigzag(length, parts))

  def _matrix(self) -> Array:
    if self.config.tie_embeddings:
      return self.embed.embedding
    return self.unembed()

  def _hidden(
    self,
    inputs: dict[str, Any],
    cache: Cache | None,
    deterministic: bool,
    skip_below: Array | None = None,
  ) -> tuple[Array, Cache | None, dict[str, dict[str, Array]]]:
    """Final hidden states; what layers returned beside, stacked."""
    c = self.config
    tokens, segments = inputs['tokens'], inputs.get('segments')
    positions = inputs.get('positions')
    b, t = tokens.shape
    index = None if cache is None else cache.length
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(t), (b, t))
      if index is not None:
        positions += index[:, None]
    spec = rope.RopeSpec(**vars(c.rope))
    rotation = rope.rotation(positions, c.head_dim, spec)
    if c.scan:  # else TPU compilers make it anew in every layer
      rotation = rope.Rotation(*jax.lax.optimization_barrier(rotation))
    around = Surroundings(rotation, segments, index, skip_below)
    valid = None if segments is None else segments != 0
    call = Call(around, valid, deterministic)
    x = sharding.constrain(self.embed(tokens), *sharding.RESIDUAL)
    caches = None if cache is None else cache.layers
    if c.scan:
      x, (caches, extras) = self.layers(x, caches, call)
    else:
      found = []
      for i, layer in enumerate(self.layers):
        x, out = layer(x, None if caches is None else caches[i], call)
        found.append(out)
      caches, every = zip(*found, strict=True)
      extras = jax.tree.map(lambda *each: jnp.stack(each), *every)
    if cache is not None:
      new = t if valid is None else jnp.sum(valid, axis=1, dtype=jnp.int32)
      cache = Cache(caches, cache.length + new)
    return self.final_norm(x), cache, extras

  def _cross_entropy(
    self, x: Array, targets: Array, weights: Array
  ) -> losses.LossSums:
    c = self.config
    spec = losses.LossSpec(
      chunk=c.logit_chunk,
      z_loss=c.z_loss,
      vocab_first=c.tie_embeddings,
      token_axes=sharding.mesh_axes('batch') + sharding.mesh_axes('length'),
      vocab_axis=''.join(sharding.mesh_axes('vocab')),
      width_axes=sharding.mesh_axes('embed'),
    )
    place = functools.partial(_place, c.tie_embeddings)
    return losses.cross_entropy(
      x, self._matrix(), targets, weights, spec, place
    )


def _place(tied: bool, function: Any, differentiate: bool) -> Any:
  """The loss on each device's tokens and part of the vocabulary."""
  rows = ('batch', 'length')
  tokens = (*rows, None)
  matrix = ('vocab', 'embed') if tied else ('embed', 'vocab')
  sums: Any = ((), (), (), ())
  outputs = (sums, (tokens, matrix)) if differentiate else sums
  return sharding.per_device(function, (tokens, matrix, rows, rows), outputs)


def _last_token(x: Array, segments: Array | None) -> Array:
  """[B, 1, D] of [B, T, D]; the first where a row is all padding."""
  if segments is None:
    return x[:, -1:]
  at = jnp.max(jnp.arange(x.shape[1]) * (segments != 0), axis=1)
  return jnp.take_along_axis(x, at[:, None, None], axis=1)


def _permute(inputs: dict[str, Any], order: Any) -> dict[str, Any]:
  if order is None:
    return inputs
  moved = {}
  for name, x in {'positions': None, **inputs}.items():
    if x is None and name == 'positions':
      x = jnp.broadcast_to(jnp.arange(len(order)), inputs['tokens'].shape)
    if x is not None:
      x = sharding.constrain(x[:, order], 'batch', 'length')
    moved[name] = x
  return moved


def init_cache(
  config: ModelConfig, batch: int, length: int, dtype: Any = ''
) -> Cache:
  """An empty cache with room for `length` tokens in each of `batch` rows."""
  kind = jnp.dtype(dtype or config.dtype)
  shape = (batch, config.kv_heads, length, config.head_dim)

  def layer(*stacked):
    axes = (*[None] * len(stacked), 'batch', 'kv_heads', 'kv_length', None)
    # Two arrays, so that both can be donated.
    return KV(
      *(
        sharding.constrain(jnp.zeros((*stacked, *shape), kind), *axes)
        for _ in KV._fields
      )
    )

  pattern = len(config.windows)
  layers: Any
  if not config.scan:
    layers = tuple(layer() for _ in range(config.depth))
  elif pattern == 1:
    layers = layer(config.depth)
  else:
    layers = tuple(layer(config.depth // pattern) for _ in range(pattern))
  return Cache(layers, jnp.zeros(batch, jnp.int32))
