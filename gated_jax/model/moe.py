"""Mixture of experts as a layer: parameters for `gated_jax/ops/moe`.

    router/kernel [D, E]    gate_proj, up [E, D, F]    down [E, F, D]
    router/bias [E]                        (with config.moe.bias)
    reduce/kernel [D, R], input_norm/scale [R], expand/kernel [R, D]
                                           (with config.moe.reduced_width)
    output_norm/scale [D]                  (with config.moe.output_norm)
    shared/{gate_proj, up, down}/kernel    (with config.moe.shared_width)
    shared_gate/kernel [D, 1]              (with config.moe.shared_gate)

Experts of a reduced width R read and write R channels in place of D; the router
and a shared expert see all of them.

The router's losses go over the whole batch: they stand outside the part that
runs device by device, where a sum over a sharded axis is a global sum.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.config import ModelConfig
from gated_jax.model.layers import MLP
from gated_jax.model.layers import Scale
from gated_jax.model.layers import norm
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import project
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import normal
from gated_jax.model.parameters import parameter
from gated_jax.ops import moe
from gated_jax.ops.route import RouteSpec
from gated_jax.ops.route import Routing
from gated_jax.ops.route import route
from gated_jax.ops.route import router_statistics
from gated_jax.sharding import Axes
from gated_jax.sharding import mesh_axes
from gated_jax.sharding import per_device

# The chosen experts and their weights; remat policies know this name.
ROUTING_NAME = 'routing'
# What experts of a reduced width read, before its norm, and what they give.
REDUCED_NAME = 'reduced'
SUM_NAME = 'expert_sum'
# Logical names of the axes of gate_proj, up and down.
STORED: tuple[Axes, ...] = (
  ('experts', 'expert_embed', 'mlp'),
  ('experts', 'expert_embed', 'mlp'),
  ('experts', 'mlp', 'expert_embed'),
)


class MoEOutput(NamedTuple):
  """A layer's output, the losses that it adds, and numbers for the log."""

  output: Float[Array, 'B T D']
  losses: dict[str, Array]  # scaled already: add them up
  logs: dict[str, Array]


class MoE(nn.Module):
  """Routed SwiGLU experts, and a shared one where the config has it."""

  config: ModelConfig
  width: int  # hidden channels of one expert
  limit: float = 0.0  # see gated_jax/ops/swiglu.py
  shared_limit: float = 0.0
  saved: tuple[str, ...] = ()  # for backward; see `ExpertSpec`

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    valid: Bool[Array, 'B T'] | None = None,
  ) -> MoEOutput:
    """Applies the experts.

    Args:
      x: tokens.
      valid: tokens that the losses and the load count, which padding is not;
        None: all. Every token is computed either way.
    """
    c = self.config
    # The router is small, and whole on every device: its choices are needed
    # where the tokens are.
    kernel, bias = Router(c, name='router')()
    spec = RouteSpec(
      c.moe.top_k,
      score=c.moe.score,
      normalize=c.moe.normalize,
      scale=c.moe.scale,
      groups=c.moe.groups,
      top_groups=c.moe.top_groups,
      softcap=c.moe.softcap,
      logit_scale=c.moe.logit_scale,
    )
    routing = route(x, kernel, spec, bias, valid)
    statistics = router_statistics(routing, valid)
    experts = self._weights()
    x = x.astype(jnp.dtype(c.dtype))
    if c.moe.reduced_width:
      y = self._expanded(self._apply(self._reduced(x), routing, experts))
    else:
      y = self._apply(x, routing, experts)
    if c.moe.shared_width:
      y += self._shared(x)
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

  def _weights(self) -> moe.ExpertWeights:
    """All experts, and the scale of their outputs where they are normed."""
    c = self.config
    e, d, f = c.moe.experts, c.moe.reduced_width or c.width, self.width

    def weights(name: str, shape: tuple[int, ...], axes: Axes) -> Array:
      """A stack of matrices, one for each expert."""
      init, dtype = normal(c.init_std), c.param_dtype
      return parameter(
        self, name, shape, axes, Kind.MATRIX, init=init, dtype=dtype, inputs=1
      )

    kinds = c.norm_zero_centered, c.param_dtype
    return moe.ExpertWeights(
      weights('gate_proj', (e, d, f), STORED[0]),
      weights('up', (e, d, f), STORED[1]),
      weights('down', (e, f, d), STORED[2]),
      Scale(d, *kinds, name='output_norm')() if c.moe.output_norm else None,
    )

  def _reduced(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T R']:
    """The tokens in the channels of the experts."""
    c = self.config
    shape = (c.width, c.moe.reduced_width)
    kinds = (c.init_std, c.param_dtype)
    matrix = Kernel(shape, ('embed', 'mlp'), 1, *kinds, name='reduce')()
    return norm(c, 'input_norm', project(x, matrix, c.dtype, REDUCED_NAME))

  def _expanded(self, y: Float[Array, 'B T R']) -> Float[Array, 'B T D']:
    """The experts' sum in the channels of the residual stream."""
    c = self.config
    shape = (c.moe.reduced_width, c.width)
    kinds = (c.init_std, c.param_dtype)
    matrix = Kernel(shape, ('mlp', 'embed'), 1, *kinds, name='expand')()
    return project(checkpoint_name(y, SUM_NAME), matrix, c.dtype)

  def _shared(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """The expert that every token takes, scaled where it has a gate."""
    c = self.config
    y = MLP(c, c.moe.shared_width, self.shared_limit, name='shared')(x)
    if not c.moe.shared_gate:
      return y
    matrix = Kernel(
      (c.width, 1),
      ('embed', None),
      init_std=c.init_std,
      param_dtype=c.param_dtype,
      kind=Kind.GATE,
      name='shared_gate',
    )
    logits = project(x, matrix(), c.dtype)
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    return (scores * y).astype(y.dtype)

  def _apply(
    self,
    x: Float[Array, 'B T D'],
    routing: Routing,
    experts: moe.ExpertWeights,
  ) -> Float[Array, 'B T D']:
    """Sends each device's tokens to their experts, on any device, and back."""
    split = mesh_axes('experts')
    spec = moe.ExpertSpec(
      implementation=self.config.moe.implementation,
      slack=self.config.moe.slack,
      chunks=self.config.moe.chunks,
      saved=self.saved,
      limit=self.limit,
      norm_eps=self.config.output_eps,
      expert_axis=split[0] if split else '',
      token_axes=mesh_axes('batch') + mesh_axes('length'),
      tensor_axis=''.join(mesh_axes('mlp')),
    )

    def join(*shards: Array) -> tuple[Array, ...]:
      """A device's shards of all matrices, as they will be multiplied."""
      made = moe.Matrices.of(moe.ExpertWeights(*shards), spec.implementation)
      return (*made.into, made.down)

    def run(
      x: Array, indices: Array, weights: Array, scale: Any, *matrices: Array
    ) -> Array:
      """Each device's share of the work: its tokens and experts."""
      *into, down = matrices
      mine = moe.Matrices(tuple(into), down, scale)
      return moe.apply_experts(x, indices, weights, mine, spec)

    shards = moe.Matrices.axes(STORED, spec.implementation)
    whole = tuple(tuple(_gathered(a) for a in names) for names in shards)
    tokens = ('batch', 'length', None)
    joined = per_device(join, STORED, shards)
    placed = per_device(run, (tokens, tokens, tokens, (None,), *whole), tokens)
    # Where these are saved, gradients can travel to the experts before the
    # router's input is there again.
    return placed(
      x,
      checkpoint_name(routing.indices, ROUTING_NAME),
      checkpoint_name(routing.weights, ROUTING_NAME),
      experts.scale,
      *joined(*(matrix.astype(x.dtype) for matrix in experts[:3])),
    )


def _gathered(axis: str | None) -> str | None:
  """The name of a matrix's axis where a device has all of its inputs."""
  return None if axis == 'expert_embed' else axis


class Router(nn.Module):
  """Owns the router's `kernel`, and a `bias` where the config has one."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> tuple[Float[Array, 'D E'], Float[Array, ' E'] | None]:
    c = self.config
    kernel = parameter(
      self,
      'kernel',
      (c.width, c.moe.experts),
      ('embed', None),
      Kind.ROUTER,
      init=normal(c.init_std),
      dtype=c.param_dtype if c.moe.router_dtype == 'model' else 'float32',
      inputs=1,
    )
    if not c.moe.bias:
      return kernel, None
    bias = parameter(
      self,
      'bias',
      (c.moe.experts,),
      (None,),
      Kind.LOAD_BIAS,
      init=nn.initializers.zeros,
      dtype='float32',
    )
    return kernel, bias
