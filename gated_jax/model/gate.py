"""The gate's parameters: `kernel` or `scores`, and the logits they make.

    position        elementwise   headwise    logits
    query, sdpa_output   [D, N, H]     [D, N]      [B, T, N, H or 1]
    key, value           [D, K, H]     [D, K]      [B, T, K, H or 1]
    dense_output         [D, D]                    [B, T, D]

`gated_jax/ops/gate.py` is what the logits mean, `attention.py` beside this
file where they act.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.config import GateConfig
from gated_jax.model.layers import normal
from gated_jax.model.layers import parameter
from gated_jax.model.layers import project
from gated_jax.ops import gate as ops
from gated_jax.sharding import Axes

# Backward needs the logits; remat policies know them by this name.
LOGITS_NAME = 'gate_logits'


def gate_spec(config: GateConfig) -> ops.GateSpec:
  """How the config's scores are made and applied."""
  return ops.GateSpec(
    config.activation, config.mode == 'additive', config.dtype == 'model'
  )


class Gate(nn.Module):
  """Logits from the hidden state, or the same for every token."""

  config: GateConfig
  shape: tuple[int, ...]  # of what is gated, of one token: heads and channels
  axes: Axes
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], bare: bool = False
  ) -> Float[Array, '...']:
    """Logits; `bare`: the kernel instead, for whoever multiplies it by x."""
    c = self.config
    headwise = c.granularity == 'headwise'
    shape, axes = self.shape, self.axes
    if headwise:
      shape, axes = shape[:-1], axes[:-1]
    std = c.init_std if c.init == 'normal' else 0.0
    if c.source == 'parameter':
      logits = parameter(
        self, 'scores', shape, axes, init=normal(std), dtype=self.param_dtype
      )
      logits = logits.astype(jnp.dtype(self.dtype))[None, None]
    else:
      x = x[..., : c.channels] if c.channels else x
      # A few channels are too few to be split over devices.
      into = None if c.channels else 'embed'
      axes = (into, *axes)
      kernel = parameter(
        self,
        'kernel',
        (x.shape[-1], *shape),
        axes,
        init=normal(std),
        dtype=self.param_dtype,
      )
      if bare:
        return kernel
      logits = project(x, kernel, axes, self.dtype, name=LOGITS_NAME)
    return logits[..., None] if headwise else logits
