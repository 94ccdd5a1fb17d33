"""Experts as functions on arrays; `apply.py` is where to begin."""

from gated_jax.ops.moe.apply import apply_experts
from gated_jax.ops.moe.experts import PRODUCT_NAME
from gated_jax.ops.moe.experts import ROWS_NAME
from gated_jax.ops.moe.experts import ExpertSpec
from gated_jax.ops.moe.experts import ExpertWeights
from gated_jax.ops.moe.experts import Matrices
from gated_jax.ops.moe.grouped_matmul import check_platform

__all__ = [
  'PRODUCT_NAME',
  'ROWS_NAME',
  'ExpertSpec',
  'ExpertWeights',
  'Matrices',
  'apply_experts',
  'check_platform',
]
