"""Gated attention for other people's models.

`GatedAttention` takes the place of `nn.MultiHeadDotProductAttention`: the same
fields, arguments, parameters and initial values, and a gate. Decoders use
`mixers/attention.py`, which computes both; `gated_jax/nnx.py` is the same for
NNX.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.config import GateConfig
from gated_jax.model.layers import rms_norm
from gated_jax.model.linear import Making
from gated_jax.model.mixers import attend
from gated_jax.model.mixers.attend import AttentionLayer
from gated_jax.model.mixers.attention import project_inputs
from gated_jax.model.mixers.attention import project_output
from gated_jax.model.mixers.owned import head_scale
from gated_jax.model.mixers.weigh import Weighing
from gated_jax.model.mixers.weigh import weigh
from gated_jax.model.other_inputs import GateWord
from gated_jax.model.other_inputs import gate_of
from gated_jax.model.other_inputs import one_mask
from gated_jax.model.other_inputs import three_inputs
from gated_jax.ops.attention.masks import all_of

Initializer = Callable[..., Any]


class GatedAttention(nn.Module):
  """Multi-head attention whose heads a gate scales.

  Parameters: {query, key, value, out}/{kernel, bias}, and {query, key}_ln/scale
  with `normalize_qk`, as in `nn.MultiHeadDotProductAttention`; the gate adds
  gate/kernel or gate/scores (see `gated_jax/model/gate.py`). They are plain
  arrays unless `logical_axes` asks for boxes. With gate='none' the module
  computes what Flax's does, from the same parameters, and draws the same
  initial values from the same key. Where it differs:

  - a query that sees no key gives zero before the output projection, where
    Flax averages over all values;
  - softmax is computed in float32 at least, as with Flax's
    `force_fp32_for_softmax`; that field does not exist, nor do `attention_fn`
    and the fields for other products (`qkv_dot_general`, `qkv_dot_general_cls`,
    `out_dot_general`, `out_dot_general_cls`, `qk_attn_weights_einsum_cls`,
    `attn_weights_value_einsum_cls`);
  - `inputs_kv` is taken without a warning.

  Dropout, `sow_weights` and `precision` are computed with all attention weights
  in memory; `implementation` is for calls without them.
  """

  num_heads: int
  dtype: Any = (
    None  # type of the computation; None: that of inputs and parameters
  )
  param_dtype: Any = jnp.float32
  qkv_features: int | None = None  # all query heads; None: as the input
  out_features: int | None = None  # None: as the input
  broadcast_dropout: bool = True  # one dropout mask for all rows and heads
  dropout_rate: float = 0.0  # share of attention weights dropped
  deterministic: bool | None = None
  precision: Any = None  # precision of jax.lax.dot_general
  kernel_init: Initializer = nn.initializers.lecun_normal()
  out_kernel_init: Initializer | None = None  # None: kernel_init
  bias_init: Initializer = nn.initializers.zeros_init()
  out_bias_init: Initializer | None = None  # None: bias_init
  use_bias: bool = True
  decode: bool = False  # one token at a time, with a cache in the variables
  normalize_qk: bool = False  # LayerNorm of each query's and key's head
  gate: GateConfig | GateWord = GateConfig()
  num_kv_heads: int | None = None  # fewer than num_heads: groups share one
  causal: bool = False
  window: int = 0  # keys a query sees, itself included; 0: all. Causal only
  qk_norm: bool = False  # RMSNorm of each query's and key's head
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False
  init_std: float | None = None  # normal kernels, in place of kernel_init
  logical_axes: bool = False  # parameters in boxes that name their axes
  implementation: str = 'auto'

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, '*B T D'],
    inputs_k: Float[Array, '*B S E'] | None = None,
    inputs_v: Float[Array, '*B S E2'] | None = None,
    *,
    inputs_kv: Float[Array, '*B S E'] | None = None,
    mask: Any = None,
    deterministic: bool | None = None,
    dropout_rng: Any = None,
    sow_weights: bool = False,
  ) -> jax.Array:
    """Attends, gates, projects.

    Args:
      inputs_q: what queries, and gates on queries and outputs, are made of.
      inputs_k: what keys are made of; None: inputs_q (self-attention).
      inputs_v: what values are made of; None: inputs_k.
      inputs_kv: what both are made of.
      mask: not zero where a query sees a key; broadcasts against
        [*batch, heads, queries, keys]. It applies beside `causal`.
      deterministic: no dropout; here or as the module's field.
      dropout_rng: key for dropout; None: from the stream 'dropout'.
      sow_weights: keep attention weights in the collection 'intermediates'.

    Returns:
      [*batch, queries, out_features].
    """
    batch = inputs_q.shape[:-2]
    inputs = three_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
    layer = self._layer(inputs, deterministic)
    query, key, value, logits = project_inputs(self, layer, inputs)
    query, key = self._normalized(layer, query, key)
    own, seen = value, None
    if self.decode:
      key, value, seen = self._remember(batch, key, value)
    if seen is not None:
      layer = dataclasses.replace(layer, causal=False, window=0)
    if mask is not None:
      sizes = (layer.heads, query.shape[1], key.shape[1])
      mask = one_mask(mask, batch, *sizes)
    mask = all_of([rule for rule in (mask, seen) if rule is not None])
    arrays = query, key, value, logits
    call = attend.Call(mask=mask, out_features=self.out_features or 0)
    if layer.dropout or sow_weights or self.precision is not None:
      if layer.dropout and dropout_rng is None:
        dropout_rng = self.make_rng('dropout')
      sower = self if sow_weights else None
      weighing = Weighing(
        self.broadcast_dropout, dropout_rng, self.precision, sower
      )
      output = weigh(layer, batch, arrays, mask, weighing)
    else:
      output, _ = attend.attend(self, layer, arrays, call)
    result = project_output(self, layer, (output, inputs[0], own), call)
    return result.reshape(*batch, *result.shape[1:])

  def _layer(
    self, inputs: tuple[Array, ...], deterministic: bool | None
  ) -> AttentionLayer:
    """Sizes and kinds, for these inputs."""
    width, heads = inputs[0].shape[-1], self.num_heads
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
    if self.normalize_qk and self.qk_norm:
      raise ValueError('normalize_qk=True excludes qk_norm=True')
    dropout = self.dropout_rate
    if dropout and nn.merge_param(
      'deterministic', self.deterministic, deterministic
    ):
      dropout = 0.0
    making = Making(
      self.kernel_init if self.init_std is None else None,
      self.bias_init if self.use_bias else None,
      self.precision,
      self.logical_axes,
    )
    last = dataclasses.replace(
      making, kernel_init=self.out_kernel_init or making.kernel_init
    )
    if self.use_bias and self.out_bias_init is not None:
      last = dataclasses.replace(last, bias_init=self.out_bias_init)
    return AttentionLayer(
      heads=heads,
      kv_heads=kv_heads,
      head_dim=features // heads,
      gate=gate_of(self.gate),
      causal=self.causal,
      window=self.window,
      dropout=dropout,
      qk_norm=self.qk_norm,
      norm_eps=self.norm_eps,
      norm_zero_centered=self.norm_zero_centered,
      init_std=self.init_std or 0.0,
      dtype=self._dtype(inputs),
      param_dtype=self.param_dtype,
      implementation=self.implementation,
      making=making,
      making_out=last,
    )

  def _dtype(self, inputs: tuple[Array, ...]) -> Any:
    """The dtype of the computation; by default that of all its arrays."""
    if self.dtype is not None:
      return self.dtype
    stored = jax.tree.leaves(self.variables.get('params', {}))
    return jnp.result_type(*inputs, *(stored or [jnp.dtype(self.param_dtype)]))

  def _normalized(
    self, layer: AttentionLayer, query: Array, key: Array
  ) -> tuple[Array, Array]:
    """Queries and keys, through the norm that the fields ask for."""

    def norm(x: Array, name: str) -> Array:
      """The norm of either, under Flax's own names."""
      if layer.qk_norm:
        return rms_norm(x, head_scale(layer, f'{name}_norm'), layer.norm_eps)
      return nn.LayerNorm(
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        name=f'{name}_ln',
      )(x)

    if layer.qk_norm or self.normalize_qk:
      query, key = norm(query, 'query'), norm(key, 'key')
    return query, key

  def _remember(
    self, batch: tuple[int, ...], key: Array, value: Array
  ) -> tuple[Array, Array, Bool[Array, '1 1 1 S'] | None]:
    """Keys and values of all tokens so far, and which of them there are.

    The first call makes the cache, as long as its input, and sees no cache.
    """
    exists = self.has_variable('cache', 'cached_key')

    def variable(name: str, x: Array) -> nn.Variable:
      """A variable of the cache, zero until it is written."""
      shape = (*batch, *x.shape[1:])
      return self.variable('cache', name, jnp.zeros, shape, x.dtype)

    old = variable('cached_key', key), variable('cached_value', value)
    index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
    if not exists:
      return key, value, None
    shape = old[0].value.shape
    if (*batch, 1, *key.shape[2:]) != (*shape[:-3], key.shape[1], *shape[-2:]):
      raise ValueError(
        f'decode=True takes one token at a time for a cache of shape {shape}, '
        f'not keys of shape {(*batch, *key.shape[1:])}'
      )
    at = index.value
    for variable_, x in zip(old, (key, value), strict=True):
      x = x.reshape(*batch, *x.shape[1:]).astype(variable_.value.dtype)
      variable_.value = jax.lax.dynamic_update_slice_in_dim(
        variable_.value, x, at, axis=len(batch)
      )
    index.value = at + 1
    tokens = jnp.arange(shape[-3])
    seen = tokens <= at
    if self.window:
      seen &= tokens > at - self.window
    key, value = (v.value.reshape(-1, *shape[-3:]) for v in old)
    return key, value, seen[None, None, None]


class GatedSelfAttention(GatedAttention):
  """`GatedAttention` whose inputs are all the same, as `nn.SelfAttention`."""

  @nn.compact
  def __call__(  # type: ignore[override]
    self,
    inputs_q: Float[Array, '*B T D'],
    mask: Any = None,
    deterministic: bool | None = None,
    dropout_rng: Any = None,
    sow_weights: bool = False,
  ) -> jax.Array:
    """Attends, gates, projects; see `GatedAttention`."""
    return super().__call__(
      inputs_q,
      mask=mask,
      deterministic=deterministic,
      dropout_rng=dropout_rng,
      sow_weights=sow_weights,
    )
