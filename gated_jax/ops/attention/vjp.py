"""The gate's backward, for any attention that gives its log-sum-exp.

With Y' = Y * s(G) and dY' the gradient that comes in:

    dY    = dY' * s
    delta = rowsum(dY * Y)            = rowsum(dY' * Y')
    dG    = dY' * Y * s'(G)           = dY' * Y' * (s'/s)(G)

and the gradients of query, key and value need only dY, delta and the
log-sum-exp. So the *gated* output, which the projection after it keeps in any
case, is all that is stored; Y is neither stored nor computed again. Where s
can be zero (silu, identity), and where scores are added, Y' forgets Y: there
Y is stored in its place, and Y' follows from it at the cost of one product.

A kernel is a forward and a backward without a gate; `splash.py` has one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.attention.spec import AttentionSpec
from gated_jax.ops.attention.spec import Masking
from gated_jax.ops.attention.spec import Result
from gated_jax.ops.gate import ACTIVATIONS
from gated_jax.ops.gate import Activation
from gated_jax.ops.gate import GateSpec
from gated_jax.ops.gate import apply_gate


@runtime_checkable
class Kernel(Protocol):
  """Attention without a gate. Hashable: it is a static argument."""

  def forward(
    self, query: Array, key: Array, value: Array, masking: Masking
  ) -> tuple[Array, Array]:
    """Output [B, T, N, H] and log-sum-exp [B, N, T], as in spec.py."""
    ...

  def backward(
    self,
    inputs: tuple[Array, Array, Array],
    masking: Masking,
    d_output: Array,
    lse: Array,
    delta: Array,
  ) -> tuple[Array, Array, Array]:
    """Gradients of inputs = (query, key, value); delta is [B, N, T]."""
    ...


def attend(
  kernel: Kernel,
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  gate: Float[Array, 'B T N #H'] | None,
  masking: Masking,
  spec: AttentionSpec,
) -> Result:
  """The kernel with the gate behind it, differentiated as the file says."""
  inputs = (query, key, value)
  output, lse = _gated(kernel, spec.gate, inputs, gate, masking)
  return Result(output, lse if spec.return_lse else None)


def keeps_gated(gate: Array | None, spec: GateSpec) -> bool:
  """Whether the gated output is enough for backward."""
  if gate is None:
    return True
  return not spec.additive and ACTIVATIONS[spec.activation].ratio is not None


class Narrow(NamedTuple):
  """How numbers that a row of channels has one of lie: as columns [R, 1].

  A kernel has them as [1, R], where a vector holds many.
  """

  spread: Callable[[Array], Array] = lambda x: x  # to what [R, H] broadcasts
  collect: Callable[[Array], Array] = lambda x: x  # from [R, 1]


def gate_backward(
  d_gated: Float[Array, '*R H'],
  kept: Float[Array, '*R H'],
  gate: Array | None,
  spec: GateSpec,
  activation: Activation | None = None,
  narrow: Narrow = Narrow(),
) -> tuple[Float[Array, '*R H'], Array, Array | None]:
  """(d_output, delta, d_gate) from what came in and what was kept.

  For whole arrays, and for the blocks that a kernel holds.

  Args:
    d_gated: gradient of the gated output.
    kept: the gated output, or the ungated one where `keeps_gated` says no.
    gate: logits [*R, H], or one for each row, as `narrow` says, or None.
    spec: how they were applied.
    activation: another form of the spec's, for a kernel that has a faster.
    narrow: how delta lies, and a headwise gate and its gradient.
  """
  wide = jnp.promote_types(d_gated.dtype, jnp.float32)
  gradient = d_gated.astype(wide)
  product = gradient * kept.astype(wide)

  def rowsum(x):
    return narrow.collect(jnp.sum(x, axis=-1, keepdims=True))

  if gate is None:
    return d_gated, rowsum(product), None
  headwise = gate.shape != kept.shape
  activation = activation or ACTIVATIONS[spec.activation]
  logits = gate.astype(wide)
  scores = activation.value(logits)
  if spec.model_dtype:
    scores = scores.astype(gate.dtype).astype(wide)
  across = narrow.spread(scores) if headwise else scores
  # A headwise gate's gradient is the sum over channels of what it would be
  # for each; the factor that follows is the same for all of them.
  if spec.additive:
    d_output, delta = gradient, rowsum(product)
    slope, along = activation.derivative(logits), gradient
  elif activation.ratio is None:
    d_output, delta = gradient * across, rowsum(product * across)
    slope, along = activation.derivative(logits), product
  else:
    d_output, delta = gradient * across, rowsum(product)
    slope, along = activation.ratio(logits), product
  if headwise:
    along = delta if activation.ratio and not spec.additive else rowsum(along)
  return (
    d_output.astype(d_gated.dtype),
    delta,
    (along * slope).astype(gate.dtype),
  )


def attention_backward(
  inputs: tuple[Array, Array, Array],
  visible: Bool[Array, '#B #N T S'],
  d_output: Float[Array, 'B T N H'],
  lse: Float[Array, 'B N T'],
  delta: Float[Array, 'B N T'],
  scale: float,
) -> tuple[Array, Array, Array]:
  """Gradients of query, key and value in plain arrays: what kernels compute.

  With P = exp(scale * Q K^T - lse): dV = P^T dY, dS = P * (dY V^T - delta),
  dQ = scale * dS K, dK = scale * dS^T Q.
  """
  query, key, value = inputs
  b, t, n, h = query.shape
  k = key.shape[2]
  grouped = (b, t, k, n // k, h)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  q, dy = (x.reshape(grouped).astype(wide) for x in (query, d_output))
  keys, values = key.astype(wide), value.astype(wide)
  by_group = (b, k, n // k, t)
  shape = (b, n, t, key.shape[1])
  logits = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q, keys).reshape(shape)
  empty = jnp.isneginf(lse)
  safe = jnp.where(empty, 0.0, lse)[..., None]
  seen = visible & ~empty[..., None]
  p = jnp.where(seen, jnp.exp(jnp.where(seen, logits - safe, 0.0)), 0.0)
  p = p.reshape(*by_group, -1)
  dp = jnp.einsum('BTKGH,BSKH->BKGTS', dy, values)
  ds = scale * p * (dp - delta.reshape(*by_group, 1))
  d_query = jnp.einsum('BKGTS,BSKH->BTKGH', ds, keys).reshape(query.shape)
  d_key = jnp.einsum('BKGTS,BTKGH->BSKH', ds, q)
  d_value = jnp.einsum('BKGTS,BTKGH->BSKH', p, dy)
  return (
    d_query.astype(query.dtype),
    d_key.astype(key.dtype),
    d_value.astype(value.dtype),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(kernel, spec, inputs, gate, masking):
  return _forward(kernel, spec, inputs, gate, masking)[0]


def _forward(kernel, spec, inputs, gate, masking):
  output, lse = kernel.forward(*inputs, masking)
  lse = checkpoint_name(lse, LSE_NAME)
  if gate is None:
    gated = kept = checkpoint_name(output, OUTPUT_NAME)
  elif keeps_gated(gate, spec):
    gated = kept = checkpoint_name(apply_gate(output, gate, spec), OUTPUT_NAME)
  else:
    kept = checkpoint_name(output, OUTPUT_NAME)
    gated = apply_gate(kept, gate, spec)
  return (gated, lse), (inputs, gate, masking, kept, lse)


def _backward(kernel, spec, saved, gradients):
  inputs, gate, masking, kept, lse = saved
  d_gated, d_lse = gradients
  d_output, delta, d_gate = gate_backward(d_gated, kept, gate, spec)
  # d lse / d logits is P itself, with the sign opposite to delta's.
  delta = jnp.swapaxes(delta[..., 0], 1, 2) - d_lse
  d_inputs = kernel.backward(inputs, masking, d_output, lse, delta)
  return d_inputs, d_gate, None


_gated.defvjp(_forward, _backward)
