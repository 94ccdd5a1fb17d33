"""The gate's parameters, `kernel` or `scores`, and the logits they make.

    position        elementwise   headwise    gate logits
    query, sdpa_output   [D, N, H]     [D, N]      [B, T, N, H or 1]
    key, value           [D, K, H]     [D, K]      [B, T, K, H or 1]
    dense_output         [D, D]                    [B, T, D]

`gated_jax/ops/gate.py` says what the logits mean, `mixers/attention.py` where
they act.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.config import GateConfig
from gated_jax.model.fused_norm_rope import on_tpu
from gated_jax.model.linear import Matrix
from gated_jax.model.linear import project
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import normal
from gated_jax.model.parameters import parameter
from gated_jax.model.parameters import with_adapter
from gated_jax.ops import gate as ops
from gated_jax.sharding import Axes
from gated_jax.sharding import axis_size

# The backward pass needs the gate logits; remat policies know this name.
LOGITS_NAME = 'gate_logits'


def gate_spec(config: GateConfig) -> ops.GateSpec:
  """How the config's scores are made and applied."""
  return ops.GateSpec(
    config.activation, config.mode == 'additive', config.dtype == 'model'
  )


class Gate(nn.Module):
  """Owns the gate's parameter: a matrix, or scores shared by every token."""

  config: GateConfig
  inputs: int  # channels of the layer's input
  shape: tuple[int, ...]  # heads and channels of one gated token
  axes: Axes  # logical names of `shape`
  param_dtype: Any = 'float32'
  boxed: bool = True

  @nn.compact
  def __call__(self) -> Matrix:
    """The matrix; constant scores come as one without inputs."""
    c = self.config
    shape, axes = self.shape, self.axes
    if c.granularity == 'headwise':
      shape, axes = shape[:-1], axes[:-1]
    init = normal(c.init_std if c.init == 'normal' else 0.0)
    if c.source == 'parameter':
      scores = parameter(
        self,
        'scores',
        shape,
        axes if self.boxed else None,
        Kind.GATE_SCORES,
        init=init,
        dtype=self.param_dtype,
      )
      return Matrix(scores, axes, inputs=0)
    # A few channels are too few to be split over devices.
    axes = (None if c.channels else 'embed', *axes)
    kernel, adapter = with_adapter(
      self,
      'kernel',
      (c.channels or self.inputs, *shape),
      axes if self.boxed else None,
      Kind.GATE,
      init=init,
      dtype=self.param_dtype,
      inputs=1,
    )
    if not c.bias:
      return Matrix(kernel, axes, adapter=adapter)
    given = 1 if c.bias_by_head else len(shape)
    bias = parameter(
      self,
      'bias',
      shape[:given],
      axes[1 : 1 + given] if self.boxed else None,
      Kind.BIAS,
      init=nn.initializers.constant(c.bias_init),
      dtype=self.param_dtype,
    )
    if c.bias_by_head:
      bias = jnp.broadcast_to(bias[:, None], shape)
    return Matrix(kernel, axes, bias=bias, adapter=adapter)


def gate_logits(
  config: GateConfig, matrix: Matrix, x: Float[Array, 'B T D'], dtype: Any
) -> Float[Array, '...']:
  """Gate logits of every token, with a last axis of 1 if they are headwise.

  Args:
    config: of the gate.
    matrix: from `Gate`.
    x: the layer's input.
    dtype: of the product.
  """
  if matrix.inputs:
    x = x[..., : config.channels] if config.channels else x
    logits = project(x, matrix, dtype, name=LOGITS_NAME)
  else:
    logits = matrix.value.astype(jnp.dtype(dtype))[None, None]
  return logits[..., None] if config.granularity == 'headwise' else logits


def key_and_gate_share_product(gate: GateConfig, implementation: str) -> bool:
  """True where the key projection and a headwise gate share one matmul.

  One backward matmul then yields both input gradients. TPU only (slower
  elsewhere), and only with heads that are not split over devices.

  Args:
    gate: its config.
    implementation: of attention.
  """
  return (
    gate.fused
    and gate.granularity == 'headwise'
    and not (gate.channels or gate.bias)
    and axis_size('heads') == 1
    and on_tpu(implementation)
  )


def gate_scores(
  config: GateConfig, logits: Float[Array, '...']
) -> Float[Array, '...']:
  """Scores of gate logits, averaged over heads where the config shares them."""
  scores = ops.gate_scores(logits, gate_spec(config))
  return ops.share_over_heads(scores) if config.shared else scores


def apply_gate(
  config: GateConfig, y: Float[Array, '...'], logits: Float[Array, '...']
) -> Float[Array, '...']:
  """y, multiplied by the scores of these logits or with them added."""
  scores = gate_scores(config, logits)
  return ops.apply_scores(y, scores, gate_spec(config))
