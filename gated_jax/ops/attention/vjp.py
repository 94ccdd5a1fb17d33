"""The gate's backward, for any attention that returns its log-sum-exp.

With Y' = Y * s(G) and dY' the gradient that comes in:

    dY    = dY' * s
    delta = rowsum(dY * Y)            = rowsum(dY' * Y')
    dG    = dY' * Y * s'(G)           = dY' * Y' * (s'/s)(G)

and the gradients of query, key and value need only dY, delta and the
log-sum-exp. So the *gated* output, which the output projection saves in any
case, is all that is stored; Y is neither stored nor computed again. Where s
can be zero (silu, identity), and where scores are added, Y does not follow
from Y'. There Y is stored in its place, and Y' follows from it at the cost of
one product.

A kernel is a forward and a backward without a gate; `splash.py` has one.
"""

import functools
from collections.abc import Callable
from typing import Any
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
from gated_jax.ops.attention.spec import Inputs
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
    """Output [B, T, N, V] and log-sum-exp [B, N, T], as in spec.py."""
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
  kernel: Kernel, inputs: Inputs, masking: Masking, spec: AttentionSpec
) -> Result:
  """The kernel with the gate after it, differentiated as the file says."""
  output, lse = _gated(kernel, spec.gate, inputs, masking)
  return Result(output, lse if spec.return_lse else None)


def saves_gated(gate_logits: Array | None, spec: GateSpec) -> bool:
  """True where backward needs the gated output, not the ungated one."""
  if gate_logits is None:
    return True
  return not spec.additive and ACTIVATIONS[spec.activation].ratio is not None


class RowLayout(NamedTuple):
  """Layout of per-row scalars (delta, a headwise gate).

  Here they are columns [R, 1]. Inside kernels they are rows [1, R], of which
  one vector register holds many.
  """

  # Takes the layout to an array that broadcasts against [R, V].
  to_columns: Callable[[Array], Array] = lambda x: x
  # Takes [R, 1] to the layout.
  from_column: Callable[[Array], Array] = lambda x: x


def gate_backward(
  d_gated: Float[Array, '*R V'],
  saved: Float[Array, '*R V'],
  gate_logits: Array | None,
  spec: GateSpec,
  activation: Activation | None = None,
  layout: RowLayout = RowLayout(),
) -> tuple[Float[Array, '*R V'], Array, Array | None]:
  """(d_output, delta, d_gate_logits) of whole arrays or of a kernel's blocks.

  Args:
    d_gated: gradient of the gated output.
    saved: the gated output, or the ungated one where `saves_gated` says no.
    gate_logits: [*R, V], or one for each row as `layout` has it, or None.
    spec: how the logits were applied.
    activation: a faster form of the spec's, for a kernel that has one.
    layout: the layout of delta, and of a headwise gate and its gradient.
  """
  wide = jnp.promote_types(d_gated.dtype, jnp.float32)
  gradient = d_gated.astype(wide)
  product = gradient * saved.astype(wide)

  def rowsum(x: Array) -> Array:
    """Sums over a row, in the layout that kernels read."""
    return layout.from_column(jnp.sum(x, axis=-1, keepdims=True))

  if gate_logits is None:
    return d_gated, rowsum(product), None
  headwise = gate_logits.shape != saved.shape
  activation = activation or ACTIVATIONS[spec.activation]
  logits = gate_logits.astype(wide)
  scores = activation.value(logits)
  if spec.model_dtype:
    scores = scores.astype(gate_logits.dtype).astype(wide)
  factor = layout.to_columns(scores) if headwise else scores
  # d_gate_logits = sensitivity * slope. The slope is the same for all channels
  # of a headwise gate, so the sensitivity is summed over them first.
  if spec.additive:
    d_output, delta = gradient, rowsum(product)
    slope, sensitivity = activation.derivative(logits), gradient
  elif activation.ratio is None:
    d_output, delta = gradient * factor, rowsum(product * factor)
    slope, sensitivity = activation.derivative(logits), product
  else:
    d_output, delta = gradient * factor, rowsum(product)
    slope, sensitivity = activation.ratio(logits), product
  if headwise:
    same = activation.ratio is not None and not spec.additive
    sensitivity = delta if same else rowsum(sensitivity)
  return (
    d_output.astype(d_gated.dtype),
    delta,
    (sensitivity * slope).astype(gate_logits.dtype),
  )


def attention_backward(
  inputs: tuple[Array, Array, Array],
  visible: Bool[Array, '#B #N T S'],
  d_output: Float[Array, 'B T N V'],
  lse: Float[Array, 'B N T'],
  delta: Float[Array, 'B N T'],
  scale: float,
) -> tuple[Array, Array, Array]:
  """Gradients of query, key and value in plain arrays: what kernels compute.

  With P = exp(scale * Q K^T - lse): dV = P^T dY, dS = P * (dY V^T - delta),
  dQ = scale * dS K, dK = scale * dS^T Q.
  """
  query, key, value = inputs
  b, t, n, _ = query.shape
  k = key.shape[2]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  q, dy = (
    x.reshape(b, t, k, n // k, -1).astype(wide) for x in (query, d_output)
  )
  keys, values = key.astype(wide), value.astype(wide)
  by_group = (b, k, n // k, t)
  shape = (b, n, t, key.shape[1])
  products = jnp.einsum('BTKGH,BSKH->BKGTS', q, keys).reshape(shape)
  attention_logits = scale * products
  empty = jnp.isneginf(lse)
  safe = jnp.where(empty, 0.0, lse)[..., None]
  seen = visible & ~empty[..., None]
  p = jnp.exp(jnp.where(seen, attention_logits - safe, 0.0))
  p = jnp.where(seen, p, 0.0).reshape(*by_group, -1)
  dp = jnp.einsum('BTKGV,BSKV->BKGTS', dy, values)
  ds = scale * p * (dp - delta.reshape(*by_group, 1))
  d_query = jnp.einsum('BKGTS,BSKH->BTKGH', ds, keys).reshape(query.shape)
  d_key = jnp.einsum('BKGTS,BTKGH->BSKH', ds, q)
  d_value = jnp.einsum('BKGTS,BTKGV->BSKV', p, dy)
  return (
    d_query.astype(query.dtype),
    d_key.astype(key.dtype),
    d_value.astype(value.dtype),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(
  kernel: Kernel, spec: GateSpec, inputs: Inputs, masking: Masking
) -> tuple[Array, Array]:
  return _forward(kernel, spec, inputs, masking)[0]


def _forward(
  kernel: Kernel, spec: GateSpec, inputs: Inputs, masking: Masking
) -> tuple[tuple[Array, Array], Any]:
  query, key, value, gate_logits = inputs
  output, lse = kernel.forward(query, key, value, masking)
  lse = checkpoint_name(lse, LSE_NAME)
  if gate_logits is None:
    gated = saved = checkpoint_name(output, OUTPUT_NAME)
  elif saves_gated(gate_logits, spec):
    gated = apply_gate(output, gate_logits, spec)
    gated = saved = checkpoint_name(gated, OUTPUT_NAME)
  else:
    saved = checkpoint_name(output, OUTPUT_NAME)
    gated = apply_gate(saved, gate_logits, spec)
  return (gated, lse), (inputs, masking, saved, lse)


def _backward(
  kernel: Kernel,
  spec: GateSpec,
  residuals: Any,
  gradients: tuple[Array, Array],
) -> tuple[Inputs, None]:
  inputs, masking, saved, lse = residuals
  query, key, value, gate_logits = inputs
  d_gated, d_lse = gradients
  d_output, delta, d_gate_logits = gate_backward(
    d_gated, saved, gate_logits, spec
  )
  # The derivative of lse by the attention logits is P itself, with the sign
  # opposite to delta's.
  delta = jnp.swapaxes(delta[..., 0], 1, 2) - d_lse
  d_arrays = kernel.backward((query, key, value), masking, d_output, lse, delta)
  return Inputs(*d_arrays, d_gate_logits), None


_gated.defvjp(_forward, _backward)
