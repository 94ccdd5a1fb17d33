"""GatedAttention inside an NNX model, through Flax's bridge.

    python docs/examples/nnx_bridge.py

The bridge makes an NNX module of a linen one: its parameters become NNX
variables, which `nnx.grad` differentiates by and `nnx.Optimizer` updates.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gated_jax import GatedAttention


class Block(nnx.Module):
  """Norm, gated attention, sum."""

  def __init__(self, width, rngs):
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = nnx.bridge.ToNNX(
      GatedAttention(num_heads=4, num_kv_heads=2, causal=True), rngs=rngs
    )
    # A linen module learns its sizes from the first input. Its parameters know
    # axes by name, and without a mesh there is nothing to place them on.
    with nnx.use_eager_sharding(False):
      nnx.bridge.lazy_init(self.attention, jnp.zeros((1, 4, width)))

  def __call__(self, x):
    return x + self.attention(self.norm(x))


def train(steps=150):
  """Learns to add the mean so far; losses of the first and the last step."""
  block = Block(16, nnx.Rngs(0))
  optimizer = nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.Param)
  x = jax.random.normal(jax.random.key(1), (8, 12, 16))
  target = x + jnp.cumsum(x, axis=1) / jnp.arange(1, 13)[:, None]

  @nnx.jit
  def step(block, optimizer):
    def loss(block):
      return jnp.mean((block(x) - target) ** 2)

    value, gradient = nnx.value_and_grad(loss)(block)
    optimizer.update(block, gradient)
    return value

  losses = [float(step(block, optimizer)) for _ in range(steps)]
  return losses[0], losses[-1]


if __name__ == '__main__':
  print('first and last loss: {:.3f}, {:.3f}'.format(*train()))
