"""The product within SwiGLU (arXiv 2002.05202), and its clamped form.

h = silu(gate) * up
h = min(silu(gate), L) * clip(up, -L, L)        with a limit L
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def hidden(
  gate: Float[Array, '...'], up: Float[Array, '...'], limit: float = 0.0
) -> Float[Array, '...']:
  """silu(gate) * up, both clamped where there is a limit.

  Args:
    gate, up: two projections of the same input.
    limit: L above; 0: there is none.
  """
  if not limit:
    return jax.nn.silu(gate) * up
  return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)
