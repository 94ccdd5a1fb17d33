"""The length of queries and keys, which the rule wants to be a constant."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def inverse_norm(x: Float[Array, '... H']) -> Float[Array, '... 1']:
  """1 / |x| over the last axis.

  The epsilon stands inside the root and is no setting: released models were
  trained with this one.
  """
  return jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def normalize(x: Float[Array, '... H'], scale: float) -> Float[Array, '... H']:
  """scale x / |x| over the last axis, computed in float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * inverse_norm(wide) * scale).astype(x.dtype)
