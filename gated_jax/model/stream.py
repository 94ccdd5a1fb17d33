"""What a block reads of the residual stream, and the gradient of the stream.

That is made of what comes back through the block and of what goes past it, in
one pass where a TPU's kernel does it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import sharding
from gated_jax.model.fused_norm_rope import on_tpu
from gated_jax.model.layers import divide_by_root
from gated_jax.model.layers import rms_norm
from gated_jax.ops import norm_tpu


def read(
  x: Float[Array, 'B T D'],
  scale: Float[Array, ' D'],
  eps: float,
  implementation: str,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T D']]:
  """The stream, and its norm.

  Args:
    x: the residual stream.
    scale: the norm's.
    eps: the norm's.
    implementation: of attention.
  """
  b, t, d = x.shape
  local = b, t // sharding.parts('residual_length', t), d
  if on_tpu(implementation) and norm_tpu.fits(local, x.dtype):
    return _fork(eps, x, scale)
  return x, rms_norm(x, scale, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fork(eps: float, x: Array, scale: Array) -> tuple[Array, Array]:
  return _forward(eps, x, scale)[0]


def _forward(
  eps: float, x: Array, scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  # Not by way of `_fork`, which would hide the name of the mean from remat.
  rows = sharding.RESIDUAL
  mean = sharding.per_device(norm_tpu.mean_square, (rows,), rows[:-1])(x)
  return (x, divide_by_root(x, mean, scale, eps)), (x, scale)


def _backward(
  eps: float, saved: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, Array]:
  x, scale = saved
  d_stream, d_h = gradients
  rows: Any = sharding.RESIDUAL
  backward = sharding.per_device(
    functools.partial(norm_tpu.backward, eps=eps),
    (rows, rows, rows, (None,)),
    norm_tpu.Gradients(rows, rows),
  )
  dx, parts = backward(x, d_h, d_stream, scale)
  return dx, jnp.sum(parts, axis=(0, 1)).astype(scale.dtype)


_fork.defvjp(_forward, _backward)
