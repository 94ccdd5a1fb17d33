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


def gate_backward(
  d_gated: Float[Array, '*R H'],
  kept: Float[Array, '*R H'],
  gate: Float[Array, '*R #H'] | None,
  spec: GateSpec,
  activation: Activation | None = None,
) -> tuple[
  Float[Array, '*R H'],
  Float[Array, '*R 1'],
  Float[Array, '*R #H'] | None,
]:
  """(d_output, delta, d_gate) from what came in and what was kept.

  For whole arrays, and for the blocks that a kernel holds.

  Args:
    d_gated: gradient of the gated output.
    kept: the gated output, or the ungated one where `keeps_gated` says no.
    gate: logits, or None.
    spec: how they were applied.
    activation: another form of the spec's, for a kernel that has a faster.
  """
  wide = jnp.promote_types(d_gated.dtype, jnp.float32)
  gradient = d_gated.astype(wide)
  product = gradient * kept.astype(wide)
  delta = functools.partial(jnp.sum, axis=-1, keepdims=True)
  if gate is None:
    return d_gated, delta(product), None
  headwise = gate.shape[-1] == 1
  activation = activation or ACTIVATIONS[spec.activation]
  logits = gate.astype(wide)
  scores = activation.value(logits)
  if spec.model_dtype:
    scores = scores.astype(gate.dtype).astype(wide)
  if spec.additive:
    d_output, rowsum = gradient, delta(product)
    d_gate = gradient * activation.derivative(logits)
  elif activation.ratio is None:
    d_output, rowsum = gradient * scores, delta(product * scores)
    d_gate = product * activation.derivative(logits)
  else:
    d_output, rowsum = gradient * scores, delta(product)
    # Headwise needs the sum over channels, which is delta.
    d_gate = (rowsum if headwise else product) * activation.ratio(logits)
  if headwise and d_gate.shape[-1] != 1:
    d_gate = delta(d_gate)
  return d_output.astype(d_gated.dtype), rowsum, d_gate.astype(gate.dtype)


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
