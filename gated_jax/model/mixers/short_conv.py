"""A short convolution between two gates (LFM2, arXiv 2511.23404), as a layer.

    u = (x W_b) * (x W_x)
    y_t = sum_i w_i u_(t - W + 1 + i)      each channel's own filter
    out((x W_c) * y)

Neither gate has an activation. The state is the last W - 1 of u, whatever the
length of the text, and no positions are needed. `gated_jax/ops/delta/
convolution.py` has the filter.
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
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import Making
from gated_jax.model.linear import project
from gated_jax.model.mixer import Context
from gated_jax.model.mixers.filter_on_mesh import filter_on_mesh
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import parameter
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.delta import convolution

_CHANNELS = ('batch', 'length', 'mlp')


class ShortConv(nn.Module):
  """Sums each channel's last few inputs between two gates; a `Mixer`."""

  config: ModelConfig
  layer: LayerSpec
  splits_sequence: ClassVar[bool] = True
  restarts_by_document: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    ctx: Context,
    state: Float[Array, 'B I D'] | None,
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B I D'] | None]:
    c = self.config
    gate_in, gate_out, value = (
      self._channels(name, x) for name in ('input_gate', 'output_gate', 'value')
    )
    inputs = gate_in * value
    filters = self._of_channels('filter', c.conv.filter_width)
    setting = 'model.conv.filter_width'
    y = filter_on_mesh(inputs, filters, ctx, state, setting)
    if c.conv.bias:
      y += self._of_channels('filter_bias').astype(y.dtype)
    y = checkpoint_name(gate_out * y, OUTPUT_NAME)
    out = project(y, self._kernel('out', ('mlp', 'embed')), c.dtype)
    out = sharding.constrain(out, *sharding.RESIDUAL)
    if state is None:
      return out, None
    return out, convolution.extend(state, inputs, ctx.valid)

  def _kernel(self, name: str, axes: sharding.Axes) -> Any:
    """A square matrix of this layer, with a bias where the config has them."""
    c = self.config
    making = Making(bias_init=nn.initializers.zeros if c.conv.bias else None)
    shape = (c.width, c.width)
    kinds = (1, c.init_std, c.param_dtype, making)
    return Kernel(shape, axes, *kinds, name=name)()

  def _channels(self, name: str, x: Array) -> Float[Array, 'B T D']:
    """x projected to channels, which the tensor axis splits."""
    matrix = self._kernel(name, ('embed', 'mlp'))
    y = project(x, matrix, self.config.dtype, f'{name}_projection')
    return sharding.constrain(y, *_CHANNELS)

  def _of_channels(self, name: str, *rows: int) -> Array:
    """Weights of each channel; they begin as in a PyTorch convolution."""
    c = self.config
    bound = c.conv.filter_width**-0.5

    def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
      """Draws them."""
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    axes = (*(None,) * len(rows), 'mlp')
    kind = Kind.FILTER if rows else Kind.BIAS
    shape = (*rows, c.width)
    return parameter(
      self, name, shape, axes, kind, init=uniform, dtype=c.param_dtype
    )

  @staticmethod
  def init_state(
    config: ModelConfig,
    layer: LayerSpec,
    batch: int,
    length: int,
    dtype: Any,
    stack: tuple[int, ...],
  ) -> Float[Array, '*layers B I D']:
    """Zeros, of a size that no length changes."""
    inputs = config.conv.filter_width - 1
    empty = jnp.zeros((*stack, batch, inputs, config.width), dtype)
    return sharding.constrain(empty, *[None] * len(stack), 'batch', None, 'mlp')

  @staticmethod
  def flops(config: ModelConfig, layer: LayerSpec, length: int) -> float:
    """None: its filter counts among its parameters."""
    return 0.0
