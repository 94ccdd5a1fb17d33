"""Attention of one layer on a mesh, to its own tokens or to a cache.

`attend` splits heads, rows and the sequence over devices, extends the cache,
leaves out the heads that a gate silences, and applies the gate at sdpa_output.
"""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.model.gate import apply_gate
from gated_jax.model.gate import gate_scores
from gated_jax.model.gate import gate_spec
from gated_jax.model.layers import bare_norm
from gated_jax.model.linear import Making
from gated_jax.model.mixers import probes
from gated_jax.model.mixers.sink import SinkLogits
from gated_jax.ops.attention import api
from gated_jax.ops.attention import context
from gated_jax.ops.attention import decode
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.sink import with_sink


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
  """Sizes and kinds of one attention layer."""

  heads: int
  kv_heads: int
  head_dim: int
  gate: GateConfig = GateConfig()
  causal: bool = True
  window: int = 0  # keys a query sees, itself included; 0: all
  dropout: float = 0.0  # rate on attention weights
  qk_norm: bool = False  # RMSNorm of each query's and key's head
  qk_norm_scale: bool = True  # False: without a scale
  qk_norm_joint: bool = False  # one norm of all heads together
  head_norm: bool = False  # RMSNorm of each head's output, before the gate
  query_scale: float = 1.0  # multiplies queries
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  implementation: str = 'auto'
  making: Making = Making()
  making_out: Making = Making()  # the output projection's


class KV(NamedTuple):
  """Keys and values of one layer that later tokens attend to.

  Heads come before tokens: a decoding step then reads each head as one
  contiguous matrix, and a page of it is whole tiles of a TPU.
  """

  key: Float[Array, '*layers B K S H']
  value: Float[Array, '*layers B K S H']


class Call(NamedTuple):
  """Arrays and options of one call beside the layer's inputs."""

  segments: Int[Array, 'B T'] | None = None  # documents; None: one per row
  valid: Bool[Array, 'B T'] | None = None  # not padding; None: all
  mask: Bool[Array, '#B #N #T S'] | None = None  # True where a query sees a key
  cache: KV | None = None
  cache_length: Int[Array, ' B'] | None = None  # tokens in it already
  skip_below: Float[Array, ''] | None = None  # see ops/attention/decode.py
  out_features: int = 0  # width of the layer's output; 0: as its input


def empty_cache(shape: tuple[int, ...], dtype: Any) -> KV:
  """Zeros [*layers, B, K, S, H] for keys, and for values."""
  stacked = len(shape) - 4
  axes = (*[None] * stacked, 'batch', 'kv_heads', 'kv_length', None)

  def zeros() -> Array:
    """An empty cache, split as its axes say."""
    return sharding.constrain(jnp.zeros(shape, dtype), *axes)

  return KV(zeros(), zeros())  # two arrays, so that both can be donated


def extend(cache: KV, key: Array, value: Array, index: Array) -> KV:
  """The cache with new keys and values written from each row's index on."""

  def row(old: Array, new: Array, start: Array) -> Array:
    """One row's cache [K, S, H], written from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

  def write(old: Array, new: Array) -> Array:
    """All rows' caches, each from its own index on."""
    new = new.swapaxes(1, 2).astype(old.dtype)
    return jax.vmap(row)(old, new, index)

  return KV(write(cache.key, key), write(cache.value, value))


def attend(
  module: nn.Module,
  layer: AttentionLayer,
  arrays: tuple[Array, Array, Array, Array | None],
  call: Call,
) -> tuple[Float[Array, 'B T N H'], KV | None]:
  """Attention output, gated where the gate stands at sdpa_output.

  Args:
    module: the layer's module, for random numbers and probes.
    layer: its sizes and kinds.
    arrays: query [B, T, N, H], key and value [B, T, K, H], gate logits or None.
    call: documents, padding and the cache.

  Returns:
    The output, and the cache with these tokens in it.
  """
  query, key, value, logits = arrays
  query, key, value = (
    _saved_as(x, name)
    for x, name in ((query, 'query'), (key, 'key'), (value, 'value'))
  )
  cache, kv_heads = call.cache, key.shape[2]
  if cache is not None and call.cache_length is not None:
    cache = extend(cache, key, value, call.cache_length)
  skipped = None
  if logits is not None and call.skip_below is not None:
    scores = gate_scores(layer.gate, logits)
    scores = jnp.broadcast_to(scores, (*query.shape[:3], scores.shape[-1]))
    skipped = decode.skipped_heads(scores, kv_heads, call.skip_below)
    if probes.is_watched(module):
      module.sow('probes', 'skipped_heads', skipped)
    if (
      cache is not None
      and call.cache_length is not None
      and call.mask is None
      and not layer.head_norm
      and decode.reads_pages(
        query.shape[1], query.shape[3], layer.implementation
      )
    ):
      tokens = (query, scores, skipped, call.cache_length)
      return _read_pages(cache, tokens, layer.window), cache
  if cache is not None and call.cache_length is not None:
    key, value = (x.swapaxes(1, 2).astype(query.dtype) for x in cache)
  gate = logits if layer.gate.fused and not layer.head_norm else None
  output, lse = _on_mesh(module, layer, (query, key, value, gate), call)
  if layer.gate.has_sink and lse is not None:
    making = layer.param_dtype, layer.making.boxed
    sink = SinkLogits(layer.gate.kind, kv_heads, *making, name='sink')(query)
    output, lse = with_sink(output, lse, sink)
  if lse is not None and cache is None and probes.is_watched(module):
    documents = call.segments
    probes.sow_attention(module, query, key, lse, documents, layer.window)
  output = _finished(layer, output, logits if gate is None else None)
  if skipped is not None:
    output = decode.zero_skipped(output, skipped)
  return output, cache


def _finished(
  layer: AttentionLayer, output: Float[Array, 'B T N H'], logits: Array | None
) -> Float[Array, 'B T N H']:
  """Outputs of heads through their norm, and a gate that waits for it."""
  if layer.head_norm:
    output = bare_norm(output, layer.norm_eps)
  return output if logits is None else apply_gate(layer.gate, output, logits)


def _saved_as(x: Float[Array, 'B T N H'], name: str) -> Float[Array, 'B T N H']:
  """x, which remat policies know by name as the matrix that kernels read."""
  flat = x.reshape(*x.shape[:2], -1)
  return checkpoint_name(flat, name).reshape(x.shape)


def _copies(kv_heads: int) -> int:
  """How often each kv head is repeated where several devices share one."""
  return max(1, sharding.axis_size('kv_heads') // kv_heads)


def _repeat(x: Array, copies: int, axis: int) -> Array:
  return x if copies == 1 else jnp.repeat(x, copies, axis=axis)


def _read_pages(
  cache: KV, tokens: tuple[Array, Array, Array, Array], window: int
) -> Float[Array, 'B T N H']:
  """Gated attention of one token to those heads of the cache that it needs."""
  query, scores, skipped, cache_length = tokens
  copies = _copies(cache.key.shape[1])
  key, value = (_repeat(x, copies, 1) for x in cache)
  skipped = _repeat(skipped, copies, 2)

  def run(
    query: Array,
    key: Array,
    value: Array,
    scores: Array,
    cache_length: Array,
    skipped: Array,
  ) -> Array:
    """Each device's share of the work: its rows and heads."""
    # The cache holds the token itself by now.
    lengths = cache_length + 1
    rows = query[:, 0], key, value, scores[:, 0], lengths, skipped[:, 0]
    return decode.read_pages(*rows, window=window)[:, None]

  heads = ('batch', 'length', 'heads', None)
  pages = ('batch', 'kv_heads', 'kv_length', None)
  by_kv_head = ('batch', 'length', 'kv_heads')
  sharded = sharding.per_device(
    run, (heads, pages, pages, heads, ('batch',), by_kv_head), heads
  )
  return sharded(query, key, value, scores, cache_length, skipped)


def _on_mesh(
  module: nn.Module,
  layer: AttentionLayer,
  arrays: tuple[Array, Array, Array, Array | None],
  call: Call,
) -> Result:
  """Attention on each device's heads, rows and part of the sequence."""
  query, key, value, gate = arrays
  cached = call.cache is not None and call.cache_length is not None
  parts = 1 if cached else sharding.axis_size('length')
  copies = _copies(key.shape[2])
  key, value = (_repeat(x, copies, 2) for x in (key, value))
  returns_lse = probes.is_watched(module) or layer.gate.has_sink
  spec = AttentionSpec(
    causal=layer.causal or cached,
    window=layer.window,
    dropout=layer.dropout,
    return_lse=returns_lse,
    gate=gate_spec(layer.gate),
  )
  dropout_key = module.make_rng('dropout') if layer.dropout else None
  attend_whole = functools.partial(
    _attend_whole, implementation=layer.implementation
  )

  def run(
    query: Array,
    key: Array,
    value: Array,
    gate: Array | None,
    *masks: Any,
  ) -> tuple[Array | None, ...]:
    """Each device's share of the work: its rows and heads."""
    segments, offset, mask, dropout_key = masks
    if dropout_key is not None:  # devices draw different numbers
      for axis in sharding.mesh_axes('batch') + sharding.mesh_axes('heads'):
        place = jax.lax.axis_index(axis)
        dropout_key = jax.random.fold_in(dropout_key, place)
    masking = Masking(segments, segments, offset, mask, dropout_key)
    inputs = Inputs(query, key, value, gate)
    if parts == 1:
      return tuple(attend_whole(inputs, masking, spec))
    (axis,) = sharding.mesh_axes('length')
    skips = api.first_choice(layer.implementation).skips_hidden
    whole = (attend_whole, inputs, masking, spec, axis)
    return tuple(context.attend(*whole, skips=skips))

  rows = ('batch', 'length')
  heads = (*rows, 'heads', None)
  kv = ('batch', 'kv_length' if cached else 'length', 'kv_heads', None)
  sharded = sharding.per_device(
    run,
    (heads, kv, kv, heads, rows, ('batch',), _mask_axes(call.mask), ()),
    (heads, ('batch', 'heads', 'length') if returns_lse else None),
  )
  segments = None if cached else call.segments
  offset = call.cache_length
  return Result(
    *sharded(query, key, value, gate, segments, offset, call.mask, dropout_key)
  )


def _mask_axes(mask: Array | None) -> sharding.Axes:
  """Logical axes of a mask; its dimensions of 1 are not split."""
  if mask is None:
    return ()
  names = ('batch', 'heads', 'length', 'kv_length')
  sizes = zip(names, mask.shape, strict=True)
  return tuple(name if size > 1 else None for name, size in sizes)


def _attend_whole(
  inputs: Inputs, masking: Masking, spec: AttentionSpec, *, implementation: str
) -> Result:
  return api.gated_dot_product_attention(
    *inputs, masking=masking, spec=spec, implementation=implementation
  )
