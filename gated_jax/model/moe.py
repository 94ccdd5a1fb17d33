"""Mixture of experts as a layer: parameters for `gated_jax/ops/moe.py`.

    router/kernel [D, E]    gate_proj, up [E, D, F]    down [E, F, D]
    shared/{gate_proj, up, down}/kernel    (where config.moe.shared_width)

The router's losses go over the whole batch: they stand outside the part that
runs device by device, where a sum over a sharded axis is a global sum.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.config import ModelConfig
from gated_jax.ops import moe


class MoEOutput(NamedTuple):
  """What a layer returns: its output, what to minimise, what to log."""

  output: Float[Array, 'B T D']
  losses: dict[str, Array]  # scaled already: add them up
  logs: dict[str, Array]


def _parameter(
  module: nn.Module,
  name: str,
  config: ModelConfig,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
) -> Array:
  init = nn.initializers.normal(config.init_std)
  value: Any = module.param(
    name,
    nn.with_logical_partitioning(init, axes),
    shape,
    jnp.dtype(config.param_dtype),
  )
  return value  # param() unboxes it


class _Kernel(nn.Module):
  """One matrix under the name `kernel`."""

  config: ModelConfig
  shape: tuple[int, int]
  axes: tuple[str | None, str | None]

  @nn.compact
  def __call__(self) -> Float[Array, 'I O']:
    return _parameter(self, 'kernel', self.config, self.shape, self.axes)


class _SharedExpert(nn.Module):
  """The expert that every token takes."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config

    def kernel(name, sizes, axes):
      return _Kernel(c, sizes, axes, name=name)().astype(x.dtype)

    sizes, axes = (c.width, c.moe.shared_width), ('embed', 'mlp')
    gate = x @ kernel('gate_proj', sizes, axes)
    hidden = jax.nn.silu(gate) * (x @ kernel('up', sizes, axes))
    return hidden @ kernel('down', sizes[::-1], axes[::-1])


class MoE(nn.Module):
  """Routed SwiGLU experts, and a shared one where the config has it."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    valid: Bool[Array, 'B T'] | None = None,
  ) -> MoEOutput:
    """Applies the experts.

    Args:
      x: tokens.
      valid: tokens that the losses and the load count (padding is not one);
        None: all. Every token is computed either way.
    """
    c = self.config
    e, d, f = c.moe.experts, c.width, c.moe.width
    # The router is small, and whole on every device: its choices are needed
    # where the tokens are.
    router = _Kernel(c, (d, e), ('embed', None), name='router')()
    routing = moe.route(x, router, c.moe.top_k, c.moe.normalize)
    statistics = moe.router_statistics(routing, valid)
    dtype = jnp.dtype(c.dtype)
    into, out = ('experts', 'embed', 'mlp'), ('experts', 'mlp', 'embed')
    experts = moe.ExpertWeights(
      _parameter(self, 'gate_proj', c, (e, d, f), into).astype(dtype),
      _parameter(self, 'up', c, (e, d, f), into).astype(dtype),
      _parameter(self, 'down', c, (e, f, d), out).astype(dtype),
    )
    spec = moe.ExpertSpec(implementation=c.moe.implementation)
    x = x.astype(dtype)
    y = moe.apply_experts(x, routing.indices, routing.weights, experts, spec)
    if c.moe.shared_width:
      y += _SharedExpert(c, name='shared')(x)
    return MoEOutput(
      output=y,
      losses={
        'balance_loss': c.moe.balance_loss * statistics.balance,
        'router_z_loss': c.moe.router_z_loss * statistics.router_z,
      },
      logs={
        'balance': statistics.balance,
        'router_z': statistics.router_z,
        'max_load': statistics.max_load,
        'idle_experts': statistics.idle_experts,
      },
    )
