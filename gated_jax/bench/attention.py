"""Attention alone: forward and backward, with every gate, on every backend.

FLOPs are those of the products that the causal mask leaves: 4 H for each
visible pair of a query and a key forward, and 2.5 times that backward. The
gate's own are not counted, so what it costs shows as time.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gated_jax.bench.timing import interleaved
from gated_jax.ops.attention import api
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.spec import Inputs

GATES = ('none', 'headwise', 'elementwise')
# Rows, and tokens in each.
SHAPES = {'4k': (8, 4096), '16k': (2, 16384), 'tiny': (1, 64)}


def case_of(shape: str, segments: str = 'none', gate: str = 'none') -> Case:
  """A layer of the 1.7B model's size."""
  rows, length = SHAPES[shape]
  heads, kv_heads, width = (2, 1, 16) if shape == 'tiny' else (16, 8, 128)
  kind = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return Case(
    B=rows,
    T=length,
    N=heads,
    K=kv_heads,
    H=width,
    segments=segments,
    gate=gate,
    dtype=kind,
  )


def flops(case: Case) -> float:
  """Forward, of one call whose rows are one document each."""
  pairs = case.T * (case.T + 1) / 2
  return 4.0 * case.B * case.N * case.H * pairs


def functions(case: Case, backend: str) -> dict[str, Any]:
  """What is timed: 'forward', and 'both' with every gradient."""
  shapes = case.shapes
  keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
  arrays = {
    name: jax.random.normal(key, shape, case.dtype)
    for key, (name, shape) in zip(keys, shapes.items(), strict=False)
  }
  incoming = jax.random.normal(keys[-1], shapes['query'], case.dtype)
  masking, spec = case.masking(), case.spec
  attend = functools.partial(
    api.gated_dot_product_attention,
    masking=masking,
    spec=spec,
    implementation=backend,
  )

  def forward(arrays):
    # Forward keeps no log-sum-exp for anybody, as in evaluation.
    return attend(*Inputs(**arrays)).output

  def both(arrays, incoming):
    output, pull = jax.vjp(forward, arrays)
    return output, pull(incoming)

  ahead, whole = jax.jit(forward), jax.jit(both)
  return {
    'forward': lambda: ahead(arrays),
    'both': lambda: whole(arrays, incoming),
  }


def bench(
  shape: str, backend: str, segments: str, rounds: int
) -> Iterator[dict[str, Any]]:
  """One record for each gate and direction; gates take turns."""
  plain = case_of(shape, segments)
  made = {
    gate: functions(case_of(shape, segments, gate), backend) for gate in GATES
  }
  for direction, factor in (('forward', 1.0), ('both', 3.5)):
    times = interleaved({gate: made[gate][direction] for gate in GATES}, rounds)
    for gate in GATES:
      found = times[gate]
      yield {
        'bench': 'attention',
        'shape': f'B{plain.B} T{plain.T} N{plain.N} K{plain.K} H{plain.H}',
        'dtype': plain.dtype,
        'rows': 'whole' if segments == 'none' else segments,
        'backend': backend,
        'gate': gate,
        'direction': direction,
        'ms': 1e3 * found.median,
        'spread': found.spread,
        'tflops': factor * flops(plain) / found.median / 1e12,
        'overhead': found.median / times['none'].median - 1,
      }


def matmul(size: int, rounds: int) -> dict[str, Any]:
  """A large product of matrices: the ceiling that utilisation is held to."""
  kind = jnp.bfloat16
  a, b = (
    jax.random.normal(key, (size, size), kind)
    for key in jax.random.split(jax.random.key(1))
  )
  product = jax.jit(jnp.matmul)
  found = interleaved({'matmul': lambda: product(a, b)}, rounds)['matmul']
  return {
    'bench': 'matmul',
    'shape': f'{size} x {size} x {size}',
    'dtype': 'bfloat16',
    'ms': 1e3 * found.median,
    'spread': found.spread,
    'tflops': 2 * size**3 / found.median / 1e12,
  }
