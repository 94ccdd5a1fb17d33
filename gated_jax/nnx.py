"""Gated attention for NNX models, where `nnx.MultiHeadAttention` stood.

The parameters are NNX variables; the computation is that of the linen module
(`gated_jax/model/multi_head.py`), so both give the same numbers to the bit.
"""

from collections.abc import Callable
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.config import GateConfig
from gated_jax.model import multi_head
from gated_jax.model.other_inputs import GateWord

Initializer = Callable[..., Any]
Metadata = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})
# Parameters that a part of the layer may have, each under its own name.
PARAMETERS = ('kernel', 'bias', 'scale', 'scores')


class Parameters(nnx.Module):
  """Arrays of a part that Flax has no module for: a gate, or an RMSNorm."""

  def __init__(self, arrays: Mapping[str, Array], metadata: Metadata):
    for name, array in arrays.items():
      setattr(self, name, nnx.Param(array, **metadata))


class GatedAttention(nnx.Module):
  """Multi-head attention whose heads a gate scales.

  Parameters: {query, key, value, out}.{kernel, bias} and {query, key}_ln.scale
  as in `nnx.MultiHeadAttention`, with the same initial values from the same
  `rngs`; after them gate.kernel or gate.scores. Arguments are those of Flax's
  module. Where it differs: `decode` is False unless it is set; `attention_fn`,
  the `*_promote_dtype` and `*_dot_general` functions and the shardings of a
  call do not exist; see also `gated_jax.GatedAttention`.

  Args:
    num_heads: query heads.
    in_features: width of the input.
    qkv_features: of all query heads; None: as the input.
    out_features: None: as the input.
    num_kv_heads: fewer than num_heads: groups of them share one.
    in_kv_features: width of what keys and values are made of.
    gate: a config, or a word such as 'headwise'.
    gate_metadata: of the gate's parameters, such as their sharding.
    rngs: keys for parameters, and for dropout.
    keep_rngs: whether the module keeps a stream of keys for dropout.
    {kernel, out_kernel, ...}_metadata: of those parameters.

  The other arguments are fields of `gated_jax.GatedAttention`.
  """

  # The arguments are those of Flax's module.
  def __init__(  # noqa: PLR0913
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    in_kv_features: int | None = None,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    precision: Any = None,
    kernel_init: Initializer = nnx.initializers.lecun_normal(),
    out_kernel_init: Initializer | None = None,
    bias_init: Initializer = nnx.initializers.zeros_init(),
    out_bias_init: Initializer | None = None,
    use_bias: bool = True,
    decode: bool | None = None,
    normalize_qk: bool = False,
    gate: GateConfig | GateWord = GateConfig(),
    causal: bool = False,
    window: int = 0,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
    norm_zero_centered: bool = False,
    implementation: str = 'auto',
    rngs: nnx.Rngs,
    keep_rngs: bool = True,
    kernel_metadata: Metadata = NO_METADATA,
    out_kernel_metadata: Metadata = NO_METADATA,
    bias_metadata: Metadata = NO_METADATA,
    out_bias_metadata: Metadata = NO_METADATA,
    query_ln_scale_metadata: Metadata = NO_METADATA,
    key_ln_scale_metadata: Metadata = NO_METADATA,
    gate_metadata: Metadata = NO_METADATA,
  ):
    self.deterministic = deterministic
    self.decode = decode
    self.in_features = in_features
    self.in_kv_features = in_kv_features or in_features
    self.linen = multi_head.GatedAttention(
      num_heads=num_heads,
      dtype=dtype,
      param_dtype=param_dtype,
      qkv_features=qkv_features or in_features,
      out_features=out_features or in_features,
      broadcast_dropout=broadcast_dropout,
      dropout_rate=dropout_rate,
      precision=precision,
      use_bias=use_bias,
      normalize_qk=normalize_qk,
      gate=gate,
      num_kv_heads=num_kv_heads or num_heads,
      causal=causal,
      window=window,
      qk_norm=qk_norm,
      norm_eps=norm_eps,
      norm_zero_centered=norm_zero_centered,
      implementation=implementation,
      parent=None,
    )
    self.parts = tuple(sorted(self._shapes()))
    made = {'kernel_init': kernel_init, 'bias_init': bias_init}
    kept = {'kernel_metadata': kernel_metadata, 'bias_metadata': bias_metadata}
    for name in ('query', 'key', 'value'):
      setattr(self, name, self._linear(name, rngs, **made, **kept))
    if normalize_qk:
      norm = {'use_bias': False, 'param_dtype': param_dtype, 'rngs': rngs}
      self.query_ln = nnx.LayerNorm(
        self.head_dim, scale_metadata=query_ln_scale_metadata, **norm
      )
      self.key_ln = nnx.LayerNorm(
        self.head_dim, scale_metadata=key_ln_scale_metadata, **norm
      )
    self.out = self._linear(
      'out',
      rngs,
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      kernel_metadata=out_kernel_metadata or kernel_metadata,
      bias_metadata=out_bias_metadata or bias_metadata,
    )
    self._add_gate(rngs, gate_metadata)
    keeps = keep_rngs and dropout_rate > 0
    self.rngs = rngs.dropout.fork() if keeps else None
    self.cached_key: nnx.Cache[Array] | None = nnx.data(None)
    self.cached_value: nnx.Cache[Array] | None = nnx.data(None)
    self.cache_index: nnx.Cache[Array] | None = nnx.data(None)

  @property
  def head_dim(self) -> int:
    """Channels of one head."""
    return (self.linen.qkv_features or 0) // self.linen.num_heads

  def _linear(
    self, name: str, rngs: nnx.Rngs, **more: Any
  ) -> nnx.LinearGeneral:
    """A projection, with the linen module's shape."""
    shape = self._shapes()[name]['kernel'].shape
    axis = (-2, -1) if name == 'out' else (-1,)
    return nnx.LinearGeneral(
      shape[: len(axis)],
      shape[len(axis) :],
      axis=axis,
      use_bias=self.linen.use_bias,
      param_dtype=self.linen.param_dtype,
      rngs=rngs,
      **more,
    )

  def _add_gate(self, rngs: nnx.Rngs, metadata: Metadata) -> None:
    """Adds parts that Flax's module lacks: the gate, and RMSNorms of heads."""
    new = [name for name in self.parts if not hasattr(self, name)]
    arrays = self._initial(rngs.params(), new) if new else {}
    for name in new:
      own = metadata if name == 'gate' else NO_METADATA
      setattr(self, name, Parameters(arrays[name], own))

  def _examples(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Inputs of one token, of the widths that the layer was made for."""
    dtype = self.linen.param_dtype
    return (
      jax.ShapeDtypeStruct((1, self.in_features), dtype),
      jax.ShapeDtypeStruct((1, self.in_kv_features), dtype),
    )

  def _shapes(self) -> Any:
    """Shapes of the linen module's parameters."""
    quiet = self.linen.clone(deterministic=True)
    return jax.eval_shape(quiet.init, jax.random.key(0), *self._examples())[
      'params'
    ]

  def _initial(self, key: Array, names: list[str]) -> Any:
    """Initial values of some parts of the linen module."""
    quiet = self.linen.clone(deterministic=True)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in self._examples()]

    @jax.jit
    def draw(key: Array) -> Any:
      """The linen module's initial values for these parameters."""
      params = quiet.init(key, *zeros)['params']
      return {name: params[name] for name in names}

    return draw(key)

  def linen_parameters(self) -> dict[str, dict[str, Array]]:
    """The parameters as `gated_jax.GatedAttention` has them."""
    tree = {}
    for part in self.parts:
      arrays = {
        name: getattr(getattr(self, part), name, None) for name in PARAMETERS
      }
      tree[part] = {n: x[...] for n, x in arrays.items() if x is not None}
    return tree

  def __call__(  # noqa: PLR0913
    self,
    inputs_q: Float[Array, '*B T D'],
    inputs_k: Float[Array, '*B S E'] | None = None,
    inputs_v: Float[Array, '*B S E'] | None = None,
    *,
    mask: Any = None,
    deterministic: bool | None = None,
    rngs: Any = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = False,
  ) -> jax.Array:
    """Attends, gates, projects.

    Args:
      inputs_q: what queries, and gates on queries and outputs, are made of.
      inputs_k: what keys are made of; None: inputs_q (self-attention).
      inputs_v: what values are made of; None: inputs_k.
      mask: not zero where a query sees a key; broadcasts against
        [*batch, heads, queries, keys].
      deterministic: no dropout; goes before the module's own.
      rngs: keys for dropout; go before the module's own.
      sow_weights: keep attention weights as an `nnx.Intermediate`.
      decode: one token with the cache; goes before the module's own.
      is_causal: causal attention, as the constructor's `causal`.

    Returns:
      [*batch, queries, out_features].
    """
    self._check_widths(inputs_q, inputs_k, inputs_v)
    decode = self.decode if decode is None else decode
    variables: dict[str, Any] = {'params': self.linen_parameters()}
    if decode:
      variables['cache'] = self._cache()
    layer = self.linen.clone(
      decode=bool(decode), causal=self.linen.causal or is_causal, parent=None
    )
    output, changed = layer.apply(
      variables,
      inputs_q,
      inputs_k,
      inputs_v,
      mask=mask,
      sow_weights=sow_weights,
      mutable=['cache', 'intermediates'],
      **self._dropout(deterministic, rngs),
    )
    for name, value in changed.get('cache', {}).items():
      getattr(self, name)[...] = value
    for name, values in changed.get('intermediates', {}).items():
      self.sow(nnx.Intermediate, name, values[0])
    return output

  def _check_widths(self, *inputs: Array | None) -> None:
    names = 'inputs_q', 'inputs_k', 'inputs_v'
    kv = self.in_kv_features
    if inputs[1] is None and kv != self.in_features:
      raise ValueError(f'in_kv_features={kv} needs inputs_k')
    for name, x, size in zip(
      names, inputs, (self.in_features, kv, kv), strict=True
    ):
      if x is not None and x.shape[-1] != size:
        raise ValueError(
          f'{name} of shape {x.shape} must have {size} features, as the module '
          'was made for'
        )

  def _dropout(self, deterministic: bool | None, rngs: Any) -> dict[str, Any]:
    """The linen module's arguments about dropout."""
    if not self.linen.dropout_rate:
      return {}
    if deterministic is None:
      deterministic = self.deterministic
    if deterministic is None:
      raise ValueError(
        f'dropout_rate={self.linen.dropout_rate} needs deterministic, of the '
        'module or of the call'
      )
    if deterministic:
      return {'deterministic': True}
    rngs = self.rngs if rngs is None else rngs
    if rngs is None:
      raise ValueError('with keep_rngs=False a call with dropout needs rngs')
    stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
    return {'deterministic': False, 'dropout_rng': stream()}

  def _cache(self) -> dict[str, Array]:
    """The linen module's cache."""
    names = 'cached_key', 'cached_value', 'cache_index'
    variables = {name: getattr(self, name) for name in names}
    if any(variable is None for variable in variables.values()):
      raise ValueError('decode=True needs a cache: call init_cache first')
    return {name: variable[...] for name, variable in variables.items()}

  def init_cache(
    self, input_shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> None:
    """Makes an empty cache.

    Args:
      input_shape: [*batch, tokens that the cache has room for, features].
      dtype: of keys and values.
    """
    heads = self.linen.num_kv_heads or self.linen.num_heads
    shape = (*input_shape[:-1], heads, self.head_dim)
    self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
    self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
    self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

  def set_view(
    self,
    deterministic: bool | None = None,
    decode: bool | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    max_length: int | None = None,
  ) -> None:
    """Sets what `nnx.view` can change: dropout, decoding and its cache.

    Args:
      deterministic: no dropout.
      decode: one token at a time.
      batch_size: batch axes of a new cache.
      max_length: tokens that the new cache has room for.
    """
    if deterministic is not None:
      self.deterministic = deterministic
    if decode is not None:
      self.decode = decode
    if decode and batch_size is not None and max_length is not None:
      batch = (batch_size,) if isinstance(batch_size, int) else batch_size
      self.init_cache((*batch, max_length, self.in_features))
