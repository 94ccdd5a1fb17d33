"""The language model: embedding, layers, norm, logits.

    x = embed(tokens)      x = layer(x), ...      logits = norm(x) W

Which layers there are is said by words (`gated_jax/config/stack.py`). Those of
`lead` stand alone; the pattern after them is scanned: one period is compiled,
and its parameters are stacked along a first axis. `tree.py` says where each
layer lies, `block.py` what a layer does and what its backward pass recomputes.

Read `mixers/attention.py` and `gate.py` for what this project is about.
"""

import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import ModelConfig
from gated_jax.model.block import Extras
from gated_jax.model.block import Output
from gated_jax.model.block import Period
from gated_jax.model.block import collect
from gated_jax.model.block import join
from gated_jax.model.block import with_remat
from gated_jax.model.cache import Cache
from gated_jax.model.layers import INLET
from gated_jax.model.layers import Embed
from gated_jax.model.layers import Scale
from gated_jax.model.layers import Unembed
from gated_jax.model.layers import rms_norm
from gated_jax.model.mixer import Context
from gated_jax.model.mixers import mixer_named
from gated_jax.ops import loss as losses
from gated_jax.ops import rope
from gated_jax.ops.attention import context


class Loss(NamedTuple):
  """Loss of a batch; means go over tokens by their weight."""

  total: Float[Array, '']  # minimised
  nll: Float[Array, '']  # nats
  weight: Float[Array, '']  # sum of the weights
  metrics: dict[str, Array]


class Decoder(nn.Module):
  """Tokens to logits; `loss` for training; a cache, passed in and returned."""

  config: ModelConfig

  def setup(self) -> None:
    """Makes the embedding, the layers and the last norm."""
    c = self.config
    self.embed = Embed(c)
    lead = len(c.lead) if c.scan else 0
    block = with_remat(c)
    if c.scan:
      self.lead = [block(c, layer) for layer in c.layers[:lead]]
      if c.depth > lead:
        self.layers = self._scanned()
    else:
      self.layers = [block(c, layer) for layer in c.layers]
    centered = c.norm_zero_centered and not c.final_norm_plain
    self.final_norm = Scale(c.width, centered, c.param_dtype)
    if not c.tie_embeddings:
      self.unembed = Unembed(c)

  def _scanned(self) -> Any:
    """The pattern, repeated by a scan over stacked parameters."""
    c = self.config
    period = len(c.pattern)
    repeated: Any = nn.scan(
      with_remat(c) if period == 1 else Period,
      variable_axes={'params': 0, 'probes': 0, 'attention_maps': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast, 0),
      length=(c.depth - len(c.lead)) // period,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return repeated(c, c.layers[-1]) if period == 1 else repeated(c)

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
      segments: document numbers; 0 is padding. Tokens see their own document.
        With a cache only the padding counts.
      positions: each token's position in its document; None: in its row.
      cache: from `init_cache` or an earlier call; its tokens come before
        these. Padding has to be at the end of a row.
      deterministic: no dropout.
      last: logits of each row's last token that is not padding, so that T is 1.
      skip_below: heads whose gate scores are all below it are left out; see
        `gated_jax/ops/attention/decode.py`.

    Returns:
      [B, T, V] float32, and with a cache the pair of that and the cache that
      holds these tokens too.
    """
    order = self._order(tokens.shape[1], cache)
    inputs: dict[str, Any] = _permute(
      {'tokens': tokens, 'segments': segments, 'positions': positions}, order
    )
    x = self.embed(inputs['tokens'])
    x, cache, _ = self._hidden(x, inputs, cache, deterministic, skip_below)
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
    logits = losses.softcapped(logits, self.config.logit_softcap)
    logits = sharding.constrain(logits, 'batch', 'length', 'vocab')
    if order is not None:
      logits = logits[:, jnp.argsort(order)]
    return logits if cache is None else (logits, cache)

  def loss(self, batch: dict[str, Any], *, deterministic: bool = False) -> Loss:
    """Mean loss of packed rows.

    Args:
      batch: as `gated_jax/data/batch.py` describes it. Without segments a row
        is one document, without positions they count from its beginning.
      deterministic: no dropout.
    """
    c = self.config
    batch = _permute(batch, self._order(batch['tokens'].shape[1], None))
    tokens, inlet = batch['tokens'], None
    if c.tie_embeddings:
      x, inlet = self.embed.with_inlet(tokens)
    else:
      x = self.embed(tokens)
    x, _, extras = self._hidden(x, batch, None, deterministic)
    sums = self._cross_entropy(x, batch['targets'], batch['weights'], inlet)
    # The mean over layers, so that depth changes no balance.
    means = jax.tree.map(jnp.mean, extras)
    total = sum(means.get('losses', {}).values(), sums.total)
    logs = means.get('logs', {})
    metrics = {f'moe/{name}': x for name, x in logs.items()}
    if c.z_loss:
      metrics['z'] = sums.z
    return Loss(total, sums.nll, sums.weight, metrics)

  def _order(self, length: int, cache: Cache | None) -> Array | None:
    """Positions in the order that splits them over devices; None: in order."""
    parts = sharding.axis_size('length')
    if parts == 1:
      return None
    for layer in self.config.distinct_layers:
      if not mixer_named(layer.mixer).splits_sequence:
        raise ValueError(
          f'mesh.context={parts} splits rows over devices, which a layer of '
          f'the mixer {layer.mixer!r} cannot carry: set mesh.context=1'
        )
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
    x: Array,
    inputs: dict[str, Any],
    cache: Cache | None,
    deterministic: bool,
    skip_below: Array | None = None,
  ) -> tuple[Array, Cache | None, Extras]:
    """Final hidden states, the cache, and the layers' numbers, by name.

    Args:
      x: rows of the embedding for `inputs['tokens']`.
      inputs: tokens, segments and positions.
      cache: as for the call.
      deterministic: as for the call.
      skip_below: as for the call.
    """
    tokens, segments = inputs['tokens'], inputs.get('segments')
    length = None if cache is None else cache.length
    valid = None if segments is None else segments != 0
    ctx = Context(
      segments=segments if cache is None else None,
      valid=valid,
      **self._turns(tokens, inputs.get('positions'), length),
      cache_length=length,
      skip_below=skip_below,
      deterministic=deterministic,
    )
    if self.config.embed_scale != 1:
      x *= self.config.embed_scale
    x = sharding.constrain(x, *sharding.RESIDUAL)
    x, cache, extras = self._layers(x, cache, ctx)
    if cache is not None:
      new = (
        tokens.shape[1]
        if valid is None
        else jnp.sum(valid, axis=1, dtype=jnp.int32)
      )
      cache = cache._replace(length=cache.length + new)
    scale = self.final_norm()
    if self.config.output_scale != 1:  # free here: logits are linear in it
      scale *= self.config.output_scale
    return rms_norm(x, scale, self.config.norm_eps), cache, extras

  def _turns(
    self, tokens: Array, positions: Array | None, cache_length: Array | None
  ) -> dict[str, Any]:
    """What the positions of these tokens do to their queries and keys."""
    c = self.config
    b, t = tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(t), (b, t))
      if cache_length is not None:
        positions += cache_length[:, None]
    rotations = []
    for config, head_dim in c.rotations:
      rotation = rope.rotation(positions, head_dim, config)
      if c.scan:  # else TPU compilers compute it again in every layer
        rotation = rope.Rotation(*jax.lax.optimization_barrier(rotation))
      rotations.append(rotation)
    growth = None
    if c.query_growth:
      share = (positions + 1).astype(jnp.float32) / c.query_growth_length
      growth = jnp.exp(c.query_growth * jnp.log1p(share))
    return {'rotations': tuple(rotations), 'growth': growth}

  def _layers(
    self, x: Array, cache: Cache | None, ctx: Context
  ) -> tuple[Array, Cache | None, Extras]:
    """Runs all layers, those of the lead first."""
    c = self.config
    outputs: list[Output] = []
    alone = self.lead if c.scan else self.layers
    states = (None,) * len(alone)
    if cache is not None:
      states = cache.lead if c.scan else cache.layers
    numbers = jnp.arange(c.depth) if c.residual == 'depth_scaled' else None
    for i, (layer, state) in enumerate(zip(alone, states, strict=True)):
      x, output = layer(x, state, ctx, None if numbers is None else numbers[i])
      outputs.append(output)
    new = tuple(output.state for output in outputs)
    extras = [output.extras for output in outputs]
    if not c.scan:
      cache = None if cache is None else cache._replace(layers=new)
      return x, cache, collect(extras)
    if c.depth == len(c.lead):
      cache = None if cache is None else cache._replace(lead=new)
      return x, cache, collect(extras)
    single = len(c.pattern) == 1
    stacked = None
    if cache is not None:
      stacked = cache.layers[0] if single else cache.layers
    if numbers is not None:
      numbers = numbers[len(c.lead) :: len(c.pattern)]
    x, repeated = self.layers(x, stacked, ctx, numbers)
    if cache is not None:
      stacked = (repeated.state,) if single else repeated.state
      cache = cache._replace(lead=new, layers=stacked)
    return x, cache, join(collect(extras), repeated.extras)

  def _cross_entropy(
    self, x: Array, targets: Array, weights: Array, inlet: Array | None
  ) -> losses.LossSums:
    c = self.config
    spec = losses.LossSpec(
      chunk=c.logit_chunk,
      z_loss=c.z_loss,
      softcap=c.logit_softcap,
      vocab_first=c.tie_embeddings,
      token_axes=sharding.mesh_axes('batch') + sharding.mesh_axes('length'),
      vocab_axis=''.join(sharding.mesh_axes('vocab')),
      width_axes=sharding.mesh_axes('embed'),
    )
    place = functools.partial(_on_each_device, c.tie_embeddings)
    return losses.cross_entropy(
      x, self._matrix(), targets, weights, spec, place, inlet
    )


def _on_each_device(
  tied: bool, function: Callable[..., Any], differentiate: bool
) -> Callable[..., Any]:
  """The loss on each device's tokens and part of the vocabulary."""
  rows = ('batch', 'length')
  tokens = (*rows, None)
  matrix = ('vocab', 'embed') if tied else ('embed', 'vocab')
  d_matrix = INLET if tied else matrix
  sums: Any = ((), (), (), ())
  outputs = (sums, (tokens, d_matrix)) if differentiate else sums
  return sharding.per_device(function, (tokens, matrix, rows, rows), outputs)


def _last_token(
  x: Float[Array, 'B T D'], segments: Int[Array, 'B T'] | None
) -> Float[Array, 'B 1 D']:
  """[B, 1, D] of [B, T, D]; the first token's where a row is all padding."""
  if segments is None:
    return x[:, -1:]
  at = jnp.max(jnp.arange(x.shape[1]) * (segments != 0), axis=1)
  return jnp.take_along_axis(x, at[:, None, None], axis=1)


def _permute(inputs: dict[str, Any], order: Array | None) -> dict[str, Any]:
  """Arrays [B, T] with their tokens in another order."""
  if order is None:
    return inputs
  positions = inputs.get('positions')
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(len(order)), inputs['tokens'].shape)
  return {
    name: None
    if x is None
    else sharding.constrain(x[:, order], 'batch', 'length')
    for name, x in (inputs | {'positions': positions}).items()
  }
