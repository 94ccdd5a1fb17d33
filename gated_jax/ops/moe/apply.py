"""Mixture of experts as a function on arrays: no token is ever dropped.

    y = sum over the chosen experts e of p_e * down_e(silu(gate_e x) * up_e x)

`gated_jax/ops/route.py` chooses. (token, expert) pairs are sorted by expert
and go through one grouped matmul per projection. The weight p_e is multiplied
into the hidden activations, before `down`, which is linear: so the backward
pass never needs the experts' outputs again. Where each expert's output is
normed first (`experts.normed`), the weight comes after the norm, and the
backward pass computes the outputs once more.

With experts split over devices, `apply_experts` runs inside `shard_map`
(`exchange.py`). `gated_jax/model/moe.py` owns the parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.moe import rows
from gated_jax.ops.moe.exchange import exchange
from gated_jax.ops.moe.experts import ExpertSpec
from gated_jax.ops.moe.experts import ExpertWeights
from gated_jax.ops.moe.experts import Matrices
from gated_jax.ops.moe.experts import swiglu
from gated_jax.ops.moe.grouped_matmul import row_tile


def apply_experts(
  x: Float[Array, 'B T D'],
  indices: Int[Array, 'B T k'],
  weights: Float[Array, 'B T k'],
  experts: ExpertWeights | Matrices,
  spec: ExpertSpec = ExpertSpec(),
) -> Float[Array, 'B T D']:
  """Each token through the experts chosen for it, summed by weight.

  Args:
    x: tokens, in the dtype of the matmuls.
    indices: experts of each token, numbered over all devices.
    weights: one per choice.
    experts: in the dtype of the matmuls, as they are stored or multiplied.
    spec: static options; with axis names the call stands inside shard_map.
  """
  b, t, d = x.shape
  k = indices.shape[-1]
  flat = x.reshape(b * t, d)
  choices = indices.reshape(b * t, k).astype(jnp.int32)
  weights = weights.reshape(b * t, k)
  matrices = experts
  if isinstance(matrices, ExpertWeights):
    matrices = Matrices.of(matrices, spec.implementation)
  run = exchange if spec.expert_axis else _local
  y = run(flat, weights, choices, matrices, spec)
  if spec.tensor_axis and matrices.scale is None:  # else they are sums already
    y = jax.lax.psum(y, spec.tensor_axis)
  return y.reshape(b, t, d)


def _local(
  x: Float[Array, 'M D'],
  weights: Float[Array, 'M k'],
  choices: Int[Array, 'M k'],
  matrices: Matrices,
  spec: ExpertSpec,
) -> Float[Array, 'M D']:
  """All experts are here: one sort, no exchange."""
  flat = choices.reshape(-1)
  order, rank = rows.sort(flat)
  tile = row_tile(spec.implementation, flat.size)
  order = jnp.pad(order, (0, -flat.size % tile))
  slot = rank.reshape(choices.shape)
  y = swiglu(
    rows.spread(x, order, slot),
    rows.spread_weights(weights, order, slot),
    matrices,
    rows.count(flat, matrices.down.shape[0]),
    spec,
  )
  return rows.collect(y, order, slot)
