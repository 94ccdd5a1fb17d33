"""Norm and rotation of heads as one kernel on each device, where a TPU can."""

from collections.abc import Callable

from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.ops import rope
from gated_jax.ops import rope_tpu
from gated_jax.ops.attention import api


def on_tpu(implementation: str) -> bool:
  """Whether this is for a TPU: who asks for its kernels says so anywhere."""
  return api.first_choice(implementation).on_tpu


def norm_and_rotation(
  x: Float[Array, 'B T N H'],
  axis: str,
  rotation: rope.Rotation | None,
  eps: float,
  implementation: str,
) -> Callable[[Array, Array | None], Array] | None:
  """A function of (x, the norm's scale or None); None where that cannot be.

  Args:
    x: queries or keys, as projected.
    axis: what their heads are called: heads or kv_heads.
    rotation: of every token.
    eps: of the norm.
    implementation: of attention.
  """
  if not on_tpu(implementation) or rotation is None:
    return None
  b, t, heads, width = x.shape
  local = (b, t // sharding.axis_size('length'), heads, width)
  if rotation.cos.shape[:2] != (b, t) or not rope_tpu.fits(
    local, x.dtype, 2 * rotation.cos.shape[-1]
  ):
    return None

  def run(x, scale, cos, sin):
    turn = rope.Rotation(cos, sin)
    return rope_tpu.normalize_and_rotate(x, scale, turn, eps)

  rows = ('batch', 'length', None)
  by_head = ('batch', 'length', axis, None)
  placed = sharding.per_device(run, (by_head, (None,), rows, rows), by_head)
  return lambda x, scale: placed(x, scale, *rotation)
