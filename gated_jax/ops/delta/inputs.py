"""Arrays of the gated delta rule."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

# A value head stores a map from keys to values. It is float32, or float64 where
# the arrays are.
State = Float[Array, 'B N H V']


class Inputs(NamedTuple):
  """Arrays that each token brings.

  There may be N = R K value heads to K key heads. Key head j then serves the
  value heads j R to j R + R - 1, as kv heads serve query heads.
  """

  query: Float[Array, 'B T K H']
  key: Float[Array, 'B T K H']  # no longer than 1
  value: Float[Array, 'B T N V']
  log_decay: Float[Array, 'B T N']  # float32, g, at most 0
  beta: Float[Array, 'B T N']  # float32, from 0 to 1

  @property
  def repeats(self) -> int:
    """Value heads of each key head."""
    return self.value.shape[2] // self.key.shape[2]

  def per_value_head(
    self, x: Float[Array, 'B T K H']
  ) -> Float[Array, 'B T N H']:
    """An array of key heads, repeated for the value heads that they serve."""
    return x if self.repeats == 1 else jnp.repeat(x, self.repeats, axis=2)

  def empty_state(self) -> State:
    """The state of value heads that have seen no token."""
    rows, _, heads, width = self.value.shape
    wide = jnp.promote_types(self.value.dtype, jnp.float32)
    return jnp.zeros((rows, heads, self.key.shape[3], width), wide)

  def without_padding(self, valid: Bool[Array, 'B T'] | None) -> 'Inputs':
    """The same, but tokens that are not valid leave the state as it is."""
    if valid is None:
      return self
    return self._replace(
      log_decay=jnp.where(valid[..., None], self.log_decay, 0),
      beta=jnp.where(valid[..., None], self.beta, 0),
    )
