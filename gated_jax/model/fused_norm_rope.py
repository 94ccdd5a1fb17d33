"""Norm and rotation of query and key heads, in one kernel where a TPU can."""

import jax
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.model.layers import rms_norm
from gated_jax.ops import rope
from gated_jax.ops import rope_tpu
from gated_jax.ops.attention import api


def on_tpu(implementation: str) -> bool:
  """True where attention runs on a TPU or is told to use a TPU's kernel."""
  return api.first_choice(implementation).on_tpu


def norm_and_rotate(
  x: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'] | None,
  rotation: rope.Rotation | None,
  implementation: str,
  eps: float,
  axis: str,
) -> Float[Array, 'B T N H']:
  """Queries or keys, normalised and rotated as far as there is such a thing.

  Args:
    x: projected heads.
    scale: of their RMSNorm; None: they are not normalised.
    rotation: of every token; None: they are not rotated.
    implementation: of attention.
    eps: of the norm.
    axis: logical name of the head axis, heads or kv_heads.
  """
  if rotation is not None and _fits_kernel(x, rotation, implementation):
    return _fused(x, scale, rotation, eps, axis)
  if scale is not None:
    x = rms_norm(x, scale, eps)
  return x if rotation is None else rope.rotate(x, rotation)


def _fits_kernel(
  x: Float[Array, 'B T N H'], rotation: rope.Rotation, implementation: str
) -> bool:
  b, t, heads, width = x.shape
  local = (b, t // sharding.axis_size('length'), heads, width)
  return (
    on_tpu(implementation)
    and rotation.cos.shape[:2] == (b, t)
    and rope_tpu.fits(local, x.dtype, 2 * rotation.cos.shape[-1])
  )


def _fused(
  x: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'] | None,
  rotation: rope.Rotation,
  eps: float,
  axis: str,
) -> Float[Array, 'B T N H']:
  """Both in one kernel, on each device's heads and tokens."""

  def run(x: Array, scale: Array | None, cos: Array, sin: Array) -> jax.Array:
    """Each device's share of the work."""
    return rope_tpu.normalize_and_rotate(x, scale, rope.Rotation(cos, sin), eps)

  rows = ('batch', 'length', None)
  by_head = ('batch', 'length', axis, None)
  sharded = sharding.per_device(run, (by_head, (None,), rows, rows), by_head)
  return sharded(x, scale, *rotation)
