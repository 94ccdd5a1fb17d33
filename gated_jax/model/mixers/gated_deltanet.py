"""Gated DeltaNet (arXiv 2412.06464) as a layer of a decoder.

    q, k, v = silu(filter(x W_q)), silu(filter(x W_k)), silu(filter(x W_v))
    g = -exp(log_rate) softplus(x W_decay + step_bias)
    beta = sigmoid(x W_beta), or twice that
    y = gated delta rule of q / |q| / sqrt(H), k / |k|, v, g, beta
    out(output_scale y / rms(y) * silu(x W_gate))

Its state holds a matrix for each value head, whatever the length of the text,
and the last few inputs of the filters. It needs no positions. The mathematics
is in `gated_jax/ops/delta`.
"""

from typing import Any
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import project
from gated_jax.model.mixer import Context
from gated_jax.model.mixers import probes
from gated_jax.model.mixers.delta_on_mesh import FILTERED
from gated_jax.model.mixers.delta_on_mesh import VALUE
from gated_jax.model.mixers.delta_on_mesh import DeltaArrays
from gated_jax.model.mixers.delta_on_mesh import DeltaState
from gated_jax.model.mixers.delta_on_mesh import delta_on_mesh
from gated_jax.model.mixers.delta_on_mesh import gated_norm_on_mesh
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import parameter
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.delta import convolution


class GatedDeltaNet(nn.Module):
  """Linear attention that forgets and corrects what it stores; a `Mixer`."""

  config: ModelConfig
  layer: LayerSpec
  splits_sequence: ClassVar[bool] = True
  restarts_by_document: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], ctx: Context, state: DeltaState | None
  ) -> tuple[Float[Array, 'B T D'], DeltaState | None]:
    c, sizes = self.config, self.config.delta
    raw = tuple(self._heads(name, x) for name in FILTERED)
    logits = self._project(
      x, 'gate', (sizes.value_heads, sizes.value_dim), VALUE, Kind.GATE
    )
    log_decay, beta = self._decay_and_beta(x, ctx)
    filters = tuple(self._filter(name) for name in FILTERED)
    arrays = DeltaArrays(raw, filters, log_decay, beta)
    y, memory = delta_on_mesh(arrays, ctx, state, sizes.implementation)
    y = checkpoint_name(y, OUTPUT_NAME)
    scale = self._vector(
      'output_scale', sizes.value_dim, Kind.VECTOR, nn.initializers.ones
    )
    y = gated_norm_on_mesh(y, logits, scale, c)
    out = Kernel(
      (*y.shape[2:], c.width),
      (*VALUE, 'embed'),
      2,
      c.init_std,
      c.param_dtype,
      name='out',
    )
    y = sharding.constrain(project(y, out(), c.dtype), *sharding.RESIDUAL)
    if state is None or memory is None:
      return y, None
    query, key, value = (
      convolution.extend(old, new, ctx.valid)
      for old, new in zip(state.inputs, raw, strict=True)
    )
    return y, DeltaState(memory, (query, key, value))

  def _project(
    self,
    x: Float[Array, 'B T D'],
    name: str,
    shape: tuple[int, ...],
    axes: sharding.Axes,
    kind: Kind = Kind.MATRIX,
  ) -> Float[Array, 'B T ...']:
    """x times a matrix of this layer."""
    c = self.config
    matrix = Kernel(
      (c.width, *shape),
      ('embed', *axes),
      init_std=c.init_std,
      param_dtype=c.param_dtype,
      kind=kind,
      name=name,
    )
    saved = LOGITS_NAME if kind is Kind.GATE else f'{name}_projection'
    y = project(x, matrix(), c.dtype, saved)
    rest = (None,) * (len(shape) - 1)
    return sharding.constrain(y, 'batch', 'length', axes[0], *rest)

  def _shape(self, name: str) -> tuple[int, int]:
    """Heads and their channels in one of the filtered arrays."""
    sizes = self.config.delta
    if name == 'value':
      return sizes.value_heads, sizes.value_dim
    return sizes.key_heads, sizes.key_dim

  def _heads(self, name: str, x: Float[Array, 'B T D']) -> Array:
    """x projected to the heads of queries, keys or values."""
    return self._project(x, name, self._shape(name), FILTERED[name])

  def _filter(self, name: str) -> Float[Array, 'W N H']:
    """The filter of each channel; it begins as a PyTorch convolution does."""
    c, width = self.config, self.config.delta.filter_width
    bound = width**-0.5
    return parameter(
      self,
      f'{name}_filter',
      (width, *self._shape(name)),
      (None, *FILTERED[name]),
      Kind.FILTER,
      init=lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -bound, bound
      ),
      dtype=c.param_dtype,
    )

  def _vector(self, name: str, size: int, kind: Kind, init: Any) -> Array:
    """A vector, always float32: one number for each channel or value head."""
    axes = ('heads',) if kind is Kind.DECAY else (None,)
    return parameter(self, name, (size,), axes, kind, init=init)

  def _decay_and_beta(
    self, x: Float[Array, 'B T D'], ctx: Context
  ) -> tuple[Float[Array, 'B T N'], Float[Array, 'B T N']]:
    """The logarithm of each head's decay, and the share that it corrects."""
    heads = self.config.delta.value_heads
    step, share = (
      self._project(x, name, (heads,), ('heads',)).astype(jnp.float32)
      for name in ('decay', 'beta')
    )
    rate = jnp.exp(self._vector('log_rate', heads, Kind.DECAY, _log_rates))
    bias = self._vector('step_bias', heads, Kind.DECAY, _step_biases)
    log_decay, beta = -rate * jax.nn.softplus(step + bias), nn.sigmoid(share)
    if self.config.delta.doubled_beta:
      beta *= 2
    if probes.is_watched(self):
      weights = jnp.ones(x.shape[:2]) if ctx.valid is None else ctx.valid
      weights = weights[..., None] / (jnp.sum(weights) * heads)
      self.sow('probes', 'delta_decay', jnp.sum(weights * jnp.exp(log_decay)))
      self.sow('probes', 'delta_beta', jnp.sum(weights * beta))
    return log_decay, beta

  @staticmethod
  def init_state(
    config: ModelConfig,
    layer: LayerSpec,
    batch: int,
    length: int,
    dtype: Any,
    stack: tuple[int, ...],
  ) -> DeltaState:
    """Zeros, of a size that no length changes."""
    sizes = config.delta
    keys, values = sizes.key_heads, sizes.value_heads
    inputs = sizes.filter_width - 1

    def zeros(dtype: Any, axes: sharding.Axes, *shape: int) -> Array:
      """An empty part of the state."""
      empty = jnp.zeros((*stack, batch, *shape), dtype)
      return sharding.constrain(empty, *[None] * len(stack), 'batch', *axes)

    memory = zeros(
      'float32', ('heads', None, None), values, sizes.key_dim, sizes.value_dim
    )
    of_key = (dtype, (None, 'kv_heads', None), inputs, keys, sizes.key_dim)
    of_value = (dtype, (None, 'heads', None), inputs, values, sizes.value_dim)
    return DeltaState(
      memory, (zeros(*of_key), zeros(*of_key), zeros(*of_value))
    )

  @staticmethod
  def flops(config: ModelConfig, layer: LayerSpec, length: int) -> float:
    """Three products of each state with a vector: S^T k, k d^T and S^T q."""
    sizes = config.delta
    return 3 * 2 * sizes.value_heads * sizes.key_dim * sizes.value_dim


def _log_rates(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Rates from 1 to 16, as Mamba-2 begins (arXiv 2405.21060)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _step_biases(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Steps from 0.001 to 0.1 once softplus is taken, as Mamba-2 begins."""
  ends = jnp.log(jnp.array([1e-3, 1e-1], dtype))
  step = jnp.exp(jax.random.uniform(key, shape, dtype, *ends))
  return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
