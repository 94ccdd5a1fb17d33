"""The gate as a function on arrays: Y' = Y * act(G), or Y + act(G).

G are gate logits, X W in the paper (arXiv 2505.06708, equation 5), and act
the sigmoid by default. How the logits are computed, and where Y stands in
the layer, is the caller's business: the same two functions serve all five
positions. `gated_jax/ops/attention/api.py` is where Y is attention's output.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


class Activation(NamedTuple):
  """An activation of gate logits, with what a hand-written backward needs.

  `ratio` is derivative / value in a form that stays finite, so that the
  gradient of a multiplicative gate follows from the gated output alone:
  dG = dY' * Y' * ratio(G). It is None where the value has a zero (silu,
  identity): there the gated output forgets Y.
  """

  value: Callable[[Array], Array]
  derivative: Callable[[Array], Array]
  ratio: Callable[[Array], Array] | None


def _sigmoid_derivative(x: Array) -> Array:
  return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _silu_derivative(x: Array) -> Array:
  return jax.nn.sigmoid(x) * (1 + x * jax.nn.sigmoid(-x))


def _softplus_ratio(x: Array) -> Array:
  # sigmoid / softplus tends to 1 on the left, where both underflow.
  small = x < -15
  safe = jnp.where(small, 0.0, x)
  return jnp.where(small, 1.0, jax.nn.sigmoid(safe) / jax.nn.softplus(safe))


ACTIVATIONS: dict[str, Activation] = {
  'sigmoid': Activation(
    jax.nn.sigmoid, _sigmoid_derivative, lambda x: jax.nn.sigmoid(-x)
  ),
  'two_sigmoid': Activation(
    lambda x: 2 * jax.nn.sigmoid(x),
    lambda x: 2 * _sigmoid_derivative(x),
    lambda x: jax.nn.sigmoid(-x),
  ),
  # Non-sparse: between one half and one (Table 4, row 7).
  'ns_sigmoid': Activation(
    lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
    lambda x: 0.5 * _sigmoid_derivative(x),
    lambda x: _sigmoid_derivative(x) / (1 + jax.nn.sigmoid(x)),
  ),
  'softplus': Activation(jax.nn.softplus, jax.nn.sigmoid, _softplus_ratio),
  'silu': Activation(jax.nn.silu, _silu_derivative, None),
  'identity': Activation(lambda x: x, jnp.ones_like, None),
}


@dataclasses.dataclass(frozen=True)
class GateSpec:
  """How gate logits become scores, and how scores act. Static, hashable."""

  activation: str = 'sigmoid'
  additive: bool = False
  # False: activation and product in float32, rounded once. True: each is
  # rounded to the dtype of the arrays, as most PyTorch code does it.
  model_dtype: bool = False

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation={self.activation!r} must be one of '
        f'{", ".join(ACTIVATIONS)}'
      )


def gate_scores(
  gate_logits: Float[Array, '*shape'], spec: GateSpec = GateSpec()
) -> Float[Array, '*shape']:
  """act(gate_logits): float32, or their dtype where the spec says so."""
  wide = jnp.promote_types(gate_logits.dtype, jnp.float32)
  scores = ACTIVATIONS[spec.activation].value(gate_logits.astype(wide))
  # Rounded once, as PyTorch does: a sigmoid made of narrow steps rounds often.
  return scores.astype(gate_logits.dtype) if spec.model_dtype else scores


def apply_scores(
  y: Float[Array, '*shape'],
  scores: Float[Array, '...'],
  spec: GateSpec = GateSpec(),
) -> Float[Array, '*shape']:
  """y * scores, or y + scores, in y's dtype; scores broadcast against y."""
  if spec.model_dtype:
    scores = scores.astype(y.dtype)
  gated = y + scores if spec.additive else y * scores
  return gated.astype(y.dtype)


def apply_gate(
  y: Float[Array, '*shape'],
  gate_logits: Float[Array, '...'],
  spec: GateSpec = GateSpec(),
) -> Float[Array, '*shape']:
  """The gate, whole: y and act(gate_logits) joined as the spec says.

  Args:
    y: the array that is gated.
    gate_logits: of a shape that broadcasts against y: one a channel
      (elementwise), or with a last axis of one (headwise).
    spec: activation, product or sum, rounding.
  """
  return apply_scores(y, gate_scores(gate_logits, spec), spec)


def share_over_heads(scores: Float[Array, '*b N H']) -> Float[Array, '*b 1 H']:
  """Averages scores over the heads (the paper's head-shared gate).

  The paper averages scores (section 3.2.1); scores are what comes after the
  activation, so that is what is averaged here.
  """
  return jnp.mean(scores, axis=-2, keepdims=True)
