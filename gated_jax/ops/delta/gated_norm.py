"""The outputs of heads, normed one by one and gated.

    out = scale y / sqrt(mean(y^2) + eps) * act(z)

In plain arrays as it stands here, or in one pass by a TPU kernel
(`pallas_tpu/gated_norm.py`), wherever the rule itself is computed by one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from gated_jax.chips import LANES
from gated_jax.ops.delta import rule
from gated_jax.ops.delta.chunks import pad_tokens
from gated_jax.ops.delta.pallas_tpu.filters import PIECE
from gated_jax.ops.delta.pallas_tpu.gated_norm import NormSpec
from gated_jax.ops.delta.pallas_tpu.gated_norm import norm_and_gate

ACTIVATIONS = {'silu': jax.nn.silu, 'sigmoid': jax.nn.sigmoid}


def gated_norm(
  y: Float[Array, 'B T N H'],
  logits: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'],
  eps: float,
  activation: str,
  implementation: str = 'auto',
) -> Float[Array, 'B T N H']:
  """Normed and gated heads, in the dtype of the logits.

  Args:
    y: what heads read.
    logits: of the gate.
    scale: of the norm, the same for all heads.
    eps: added to the mean square.
    activation: of the gate, 'silu' or 'sigmoid'.
    implementation: of the rule.
  """
  spec = NormSpec(y.shape[3], eps, activation)
  one = y.shape[1] == 1
  if not one and rule.takes_kernels(implementation, refusal(logits)):
    return by_kernel(y, logits, scale, spec)
  wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
  mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean + eps) * scale.astype(wide.dtype)
  gate = ACTIVATIONS[activation](logits.astype(wide.dtype))
  return (normed * gate).astype(logits.dtype)


def refusal(logits: Float[Array, 'B T N H']) -> str:
  """The reason why the kernel cannot do this; '' where it can."""
  if logits.shape[3] % LANES:
    return f'heads of {logits.shape[3]} channels are no whole {LANES}'
  if logits.dtype not in (jnp.bfloat16, jnp.float32):
    return f'arrays are {logits.dtype}'
  return ''


def by_kernel(
  y: Float[Array, 'B T N H'],
  logits: Float[Array, 'B T N H'],
  scale: Float[Array, ' H'],
  spec: NormSpec,
  interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """The same in one pass of a kernel; see `gated_norm`."""
  batch, length = y.shape[:2]
  pad = -length % PIECE
  flat_y, flat_logits = (
    pad_tokens(x.reshape(batch, length, -1), pad)
    for x in (y.astype(logits.dtype), logits)
  )
  out = norm_and_gate(flat_y, flat_logits, scale, spec, interpret)
  return out[:, :length].reshape(y.shape)
