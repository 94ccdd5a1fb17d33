"""Softmax attention with the gate in it, as a linen module.

    Y = softmax(q k^T / sqrt(H)) v        Y' = Y * sigmoid(x W)        Y' W_o

`GatedAttention` takes the place of `nn.MultiHeadDotProductAttention`: the same
field and parameter names, arguments and masks. The rest of its options are
what decoders need. Read `gated_jax/ops/attention/api.py` for the mathematics,
`gate.py` for the gate's parameters, `decoder.py` for the model around it.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import GateConfig
from gated_jax.model import one_pass
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.gate import Gate
from gated_jax.model.gate import gate_spec
from gated_jax.model.layers import Linear
from gated_jax.model.layers import RMSNorm
from gated_jax.ops import gate as gates
from gated_jax.ops import probes
from gated_jax.ops import rope
from gated_jax.ops.attention import api
from gated_jax.ops.attention import context
from gated_jax.ops.attention import decode
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result


class KV(NamedTuple):
  """Keys and values of one layer that later tokens attend to.

  Heads come before tokens: what a step reads of a head is then one matrix,
  which products take as it lies, and a page of it is whole tiles of a TPU.
  """

  key: Float[Array, '*layers B K S H']
  value: Float[Array, '*layers B K S H']


class Surroundings(NamedTuple):
  """What self-attention in a decoder knows beside its input."""

  rotation: rope.Rotation | None = None
  segments: Int[Array, 'B T'] | None = None  # documents; 0 is padding
  filled: Int[Array, ' B'] | None = None  # tokens that a cache holds already
  # Heads whose scores are all below are left out: ops/attention/decode.py.
  skip_below: Float[Array, ''] | None = None


class GatedAttention(nn.Module):
  """Multi-head attention whose heads a gate scales.

  Parameters: {query, key, value, out}/kernel as in Flax's own module, without
  biases, and gate/kernel (see `gated_jax/model/gate.py`).
  """

  num_heads: int
  num_kv_heads: int = 0  # 0: num_heads; fewer: each serves a group of heads
  qkv_features: int = 0  # of all query heads together; 0: width of the input
  out_features: int = 0  # 0: width of the input
  gate: GateConfig = GateConfig()
  causal: bool = False
  window: int = 0  # keys a query sees, itself included; 0: all
  dropout_rate: float = 0.0  # of attention weights
  deterministic: bool | None = None
  qk_norm: bool = False  # RMSNorm of each query's and key's head
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  implementation: str = 'auto'

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, 'B T D'],
    inputs_k: Float[Array, 'B S E'] | None = None,
    inputs_v: Float[Array, 'B S E2'] | None = None,
    *,
    mask: Bool[Array, '#B #N #T S'] | None = None,
    around: Surroundings = Surroundings(),
    cache: KV | None = None,
    deterministic: bool | None = None,
  ) -> Any:
    """Attends, gates, projects.

    Args:
      inputs_q: what queries, and gates on queries and outputs, are made of.
      inputs_k: what keys are made of; None: inputs_q (self-attention).
      inputs_v: what values are made of; None: inputs_k.
      mask: True where a query sees a key; dimensions of 1 repeat.
      around: rotation, documents and cache index, in a decoder.
      cache: keys and values of earlier tokens, with room for these.
      deterministic: no dropout; here or as the module's field.

    Returns:
      [B, T, out_features], and with a cache the pair of that and the cache.
    """
    inputs_k = inputs_q if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    heads, kv_heads, width = self._sizes(inputs_q.shape[-1])
    valid = jnp.ones(inputs_q.shape[:2], bool)
    if around.segments is not None:
      valid = around.segments != 0
    (query, key, value), logits = self._projections(
      (inputs_q, inputs_k, inputs_v), around.rotation, valid
    )
    if cache is not None and around.filled is not None:
      cache = extend(cache, key, value, around.filled)
    quiet, pages = None, None
    if logits is not None and around.skip_below is not None:
      scores = self._scores(logits)
      scores = jnp.broadcast_to(scores, (*query.shape[:3], scores.shape[-1]))
      quiet = self._quiet(scores, kv_heads, around.skip_below)
      if decode.reads_pages(query.shape[1], width, self.implementation):
        pages = None if mask is not None else cache
    if pages is not None and quiet is not None and around.filled is not None:
      output = self._read_pages(query, pages, scores, quiet, around.filled)
    else:
      if cache is not None and around.filled is not None:
        key, value = (x.swapaxes(1, 2).astype(query.dtype) for x in cache)
      output, lse = self._attend(
        (query, key, value, logits if self.gate.fused else None),
        around,
        mask,
        self._dropout(deterministic),
      )
      if lse is not None and cache is None:
        self._sow_attention(query, key, lse, around)
      output = self._after(output, logits)
      if quiet is not None:
        output = decode.leave_out(output, quiet)
    result = Linear(
      (heads, width, self.out_features or inputs_q.shape[-1]),
      ('heads', 'head_dim', 'embed'),
      inputs=2,
      name='out',
      **self._kinds,
    )(output)
    result = sharding.constrain(result, *sharding.RESIDUAL)
    result = self._gated_at('dense_output', result, inputs_q, None, valid)
    return result if cache is None else (result, cache)

  def _projections(
    self,
    inputs: tuple[Array, Array, Array],
    rotation: rope.Rotation | None,
    valid: Array,
  ) -> tuple[tuple[Array, Array, Array], Array | None]:
    """Queries, keys and values as attention reads them; logits of its gate."""
    inputs_q, inputs_k, inputs_v = inputs
    heads, kv_heads, width = self._sizes(inputs_q.shape[-1])

    def linear(name, x, heads, axis):
      shape, axes = (x.shape[-1], heads, width), ('embed', axis, 'head_dim')
      save_as = f'{name}_projection'
      return Linear(shape, axes, save_as=save_as, name=name, **self._kinds)

    def project(name, x, heads, axis):
      y = linear(name, x, heads, axis)(x)
      y = sharding.constrain(y, 'batch', 'length', axis, None)
      return self._gated_at(name, y, x, axis, valid)

    of_query = (heads, width), ('heads', 'head_dim')
    query = project('query', inputs_q, heads, 'heads')
    logits = None
    if self._narrow_gate and inputs_k is inputs_q:
      narrow = self._gate(inputs_q, *of_query, bare=True)
      wide = linear('key', inputs_q, kv_heads, 'kv_heads')
      key, logits = wide(inputs_q, narrow)
      logits = checkpoint_name(logits, LOGITS_NAME)[..., None]
    else:
      # Backward adds up the gradients of x in the reverse of this order. The
      # sum costs nothing on a product as wide as the gate's.
      if self.gate.scores_output:
        logits = self._gate(inputs_q, *of_query)
      key = project('key', inputs_k, kv_heads, 'kv_heads')
    value = project('value', inputs_v, kv_heads, 'kv_heads')
    if logits is not None:
      self._sow_gate(logits, valid)
    query = self._turned(query, 'query_norm', 'heads', rotation)
    key = self._turned(key, 'key_norm', 'kv_heads', rotation)
    named = zip((query, key, value), ('query', 'key', 'value'), strict=True)
    query, key, value = (_named(x, name) for x, name in named)
    return (query, key, value), logits

  def _sizes(self, width: int) -> tuple[int, int, int]:
    """(query heads, kv heads, width of a head)."""
    heads = self.num_heads
    kv_heads = self.num_kv_heads or heads
    features = self.qkv_features or width
    if heads % kv_heads:
      raise ValueError(
        f'num_heads={heads} must be a multiple of num_kv_heads={kv_heads}'
      )
    if features % heads:
      raise ValueError(
        f'qkv_features={features} must be a multiple of num_heads={heads}'
      )
    return heads, kv_heads, features // heads

  @property
  def _kinds(self) -> dict[str, Any]:
    return {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'init_std': self.init_std,
    }

  def _norm(self, name: str) -> RMSNorm:
    return RMSNorm(
      self.norm_eps, self.norm_zero_centered, self.param_dtype, name=name
    )

  def _turned(
    self, x: Array, norm: str, axis: str, rotation: rope.Rotation | None
  ) -> Array:
    """Queries or keys, normalised and rotated as far as there is such a thing.

    On a TPU in one pass, where the kernel can.
    """
    apply = one_pass.norm_and_rotation(
      x, axis, rotation, self.norm_eps, self.implementation
    )
    if apply is not None:
      return self._norm(norm)(x, apply) if self.qk_norm else apply(x, None)
    if self.qk_norm:
      x = self._norm(norm)(x)
    return x if rotation is None else rope.rotate(x, rotation)

  def _dropout(self, deterministic: bool | None) -> float:
    if not self.dropout_rate:
      return 0.0
    return (
      0.0
      if nn.merge_param('deterministic', self.deterministic, deterministic)
      else self.dropout_rate
    )

  @property
  def _narrow_gate(self) -> bool:
    """Whether keys and gate logits share the product that makes d_x of both.

    On a TPU: elsewhere it was slower. Heads split over devices would have to
    meet for it.
    """
    g = self.gate
    return (
      g.fused
      and g.granularity == 'headwise'
      and not g.channels
      and sharding.axis_size('heads') == 1
      and one_pass.on_tpu(self.implementation)
    )

  def _gate(
    self,
    x: Array,
    shape: tuple[int, ...],
    axes: sharding.Axes,
    bare: bool = False,
  ) -> Array:
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    return Gate(self.gate, shape, axes, **kinds, name='gate')(x, bare)

  def _gated_at(
    self, position: str, y: Array, x: Array, axis: str | None, valid: Array
  ) -> Array:
    """y, gated where the config's gate stands at this position."""
    if self.gate.position != position:
      return y
    axes = (None,) if axis is None else (axis, 'head_dim')
    logits = self._gate(x, y.shape[2:], axes)
    self._sow_gate(logits, valid)
    return self._apply(y, logits)

  def _scores(self, logits: Array) -> Array:
    scores = gates.gate_scores(logits, gate_spec(self.gate))
    return gates.share_over_heads(scores) if self.gate.shared else scores

  def _apply(self, y: Array, logits: Array) -> Array:
    return gates.apply_scores(y, self._scores(logits), gate_spec(self.gate))

  def _after(self, output: Array, logits: Array | None) -> Array:
    """What stands between attention and the output projection."""
    if self.gate.kind == 'rms_norm':
      return self._norm('output_norm')(output)
    if self.gate.kind == 'silu':
      return jax.nn.silu(output)
    if logits is None or self.gate.fused:
      return output
    return self._apply(output, logits)

  def _quiet(
    self, scores: Array, kv_heads: int, threshold: Array
  ) -> Bool[Array, 'B T K']:
    """Kv heads that the gate silences."""
    quiet = decode.quiet_heads(scores, kv_heads, threshold)
    if self._watched:
      self.sow('probes', 'quiet_heads', quiet)
    return quiet

  def _read_pages(
    self,
    query: Array,
    cache: KV,
    scores: Array,
    quiet: Bool[Array, 'B T K'],
    filled: Int[Array, ' B'],
  ) -> Array:
    """Gated attention of one token to what of the cache it needs."""
    copies = self._copies(cache.key.shape[1])
    key, value = (_repeat(x, copies, 1) for x in cache)
    quiet = _repeat(quiet, copies, 2)

    def run(query, key, value, scores, filled, quiet):
      # The cache holds the token itself by now.
      arrays = query[:, 0], key, value, scores[:, 0], filled + 1, quiet[:, 0]
      return decode.read_pages(*arrays, window=self.window)[:, None]

    heads = ('batch', 'length', 'heads', None)
    kept = ('batch', 'kv_heads', 'kv_length', None)
    silent = ('batch', 'length', 'kv_heads')
    placed = sharding.per_device(
      run, (heads, kept, kept, heads, ('batch',), silent), heads
    )
    return placed(query, key, value, scores, filled, quiet)

  def _copies(self, kv_heads: int) -> int:
    """Several devices may share a kv head: each then gets its own."""
    return max(1, sharding.axis_size('kv_heads') // kv_heads)

  def _attend(
    self,
    arrays: tuple[Array, Array, Array, Array | None],
    around: Surroundings,
    mask: Array | None,
    dropout: float,
  ) -> Result:
    """Attention on each device's heads, rows and part of the sequence."""
    query, key, value, gate = arrays
    cached = around.filled is not None
    parts = 1 if cached else sharding.axis_size('length')
    copies = self._copies(key.shape[2])
    key, value = (_repeat(x, copies, 2) for x in (key, value))
    spec = AttentionSpec(
      causal=self.causal or cached,
      window=self.window,
      dropout=dropout,
      return_lse=self._watched,
      gate=gate_spec(self.gate),
    )
    dropout_key = self.make_rng('dropout') if dropout else None

    def run(query, key, value, gate, segments, offset, mask, dropout_key):
      if dropout_key is not None:
        for axis in sharding.mesh_axes('batch') + sharding.mesh_axes('heads'):
          place = jax.lax.axis_index(axis)
          dropout_key = jax.random.fold_in(dropout_key, place)
      masking = Masking(segments, segments, offset, mask, dropout_key)
      inputs = Inputs(query, key, value, gate)
      attend = functools.partial(
        _attend_whole, implementation=self.implementation
      )
      if parts == 1:
        return tuple(attend(inputs, masking, spec))
      (axis,) = sharding.mesh_axes('length')
      skips = api.first_choice(self.implementation).skips_hidden
      return tuple(
        context.attend(attend, inputs, masking, spec, axis, skips=skips)
      )

    rows = ('batch', 'length')
    kv_axes = ('batch', 'kv_length' if cached else 'length', 'kv_heads', None)
    mask_axes = (
      ()
      if mask is None
      else tuple(
        name if size > 1 else None
        for name, size in zip(
          ('batch', 'heads', 'length', 'kv_length'), mask.shape, strict=True
        )
      )
    )
    heads = (*rows, 'heads', None)
    placed = sharding.per_device(
      run,
      (heads, kv_axes, kv_axes, heads, rows, ('batch',), mask_axes, ()),
      (heads, ('batch', 'heads', 'length') if self._watched else None),
    )
    segments = None if cached else around.segments
    found = placed(
      query, key, value, gate, segments, around.filled, mask, dropout_key
    )
    return Result(*found)

  @property
  def _watched(self) -> bool:
    """Whether somebody looks at the probes of this call."""
    return not self.is_initializing() and (
      self.is_mutable_collection('probes')
      or self.is_mutable_collection('attention_maps')
    )

  def _sow_gate(self, logits: Array, valid: Array) -> None:
    """Statistics of the scores, over tokens that are not padding."""
    if not self._watched:
      return
    scores = self._scores(logits)
    if scores.ndim == 3:  # no heads any more
      logits, scores = logits[:, :, None], scores[:, :, None]
    self.sow('probes', 'gate_scores', probes.score_statistics(scores, valid))
    self.sow('probes', 'gate_logit_norm', probes.logit_norm(logits, valid))

  def _sow_attention(
    self, query: Array, key: Array, lse: Array, around: Surroundings
  ) -> None:
    """First-token attention, and all of it where someone asks for maps."""
    segments = around.segments
    parts = sharding.axis_size('length')
    if parts > 1:
      back = np.argsort(context.zigzag(query.shape[1], parts))
      query, key, lse = query[:, back], key[:, back], lse[:, :, back]
      segments = None if segments is None else segments[:, back]
    scale = query.shape[-1] ** -0.5
    arrays = (query, key, lse, segments, scale, self.window)
    self.sow('probes', 'first_token', probes.first_token_attention(*arrays))
    if self.is_mutable_collection('attention_maps'):
      maps = probes.attention_weights(*arrays)
      self.sow('attention_maps', 'attention_weights', maps)


def _repeat(x: Array, copies: int, axis: int) -> Array:
  return x if copies == 1 else jnp.repeat(x, copies, axis=axis)


def _named(x: Float[Array, 'B T N H'], name: str) -> Float[Array, 'B T N H']:
  """x, known to remat policies as the matrix that kernels read."""
  flat = x.reshape(*x.shape[:2], -1)
  return checkpoint_name(flat, name).reshape(x.shape)


def _attend_whole(inputs, masking, spec, *, implementation):
  return api.gated_dot_product_attention(
    *inputs,
    masking=masking,
    spec=spec,
    implementation=implementation,
  )


def extend(cache: KV, key: Array, value: Array, index: Array) -> KV:
  """The cache with new keys and values written from each row's index on."""

  def row(old, new, start):
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

  def write(old, new):
    new = new.swapaxes(1, 2).astype(old.dtype)
    return jax.vmap(row)(old, new, index)

  return KV(write(cache.key, key), write(cache.value, value))
