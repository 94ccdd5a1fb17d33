"""Attention alone: forward and backward, with every gate, on every backend.

FLOPs are those of the products that the causal mask leaves: 4 H for each
visible pair of a query and a key forward, and 2.5 times that backward. The
gate's own are not counted, so what it costs shows as time.
"""

import functools
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gated_jax.bench.timing import Times
from gated_jax.bench.timing import interleaved
from gated_jax.ops.attention import api
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.spec import Inputs

GATES = ('none', 'headwise', 'elementwise')
# Named numbers of tokens in a row; a shape may also be the number itself.
LENGTHS = {'4k': 4096, '16k': 16_384, 'tiny': 64}
TOKENS = 32_768  # tokens of a call, but for 'tiny'


def shape_of(name: str) -> tuple[int, int]:
  """Rows, and tokens in each, of a shape by its name.

  Raises:
    ValueError: it is neither a name nor a number of tokens.
  """
  if name == 'tiny':
    return 1, LENGTHS[name]
  if name not in LENGTHS and not (name.isdecimal() and int(name)):
    known = ', '.join(LENGTHS)
    raise ValueError(f'shape {name!r} must be a number of tokens or {known}')
  length = LENGTHS.get(name) or int(name)
  return max(1, TOKENS // length), length


def case_of(shape: str, segments: str = 'none', gate: str = 'none') -> Case:
  """A layer of the 1.7B model's size."""
  rows, length = shape_of(shape)
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
  """FLOPs of one forward call whose rows are one document each."""
  pairs = case.T * (case.T + 1) / 2
  return 4.0 * case.B * case.N * case.H * pairs


def functions(case: Case, backend: str) -> dict[str, Any]:
  """The calls to time: 'forward', and 'both' with every gradient."""
  shapes = case.shapes
  keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
  arrays = {
    name: jax.random.normal(key, shape, case.dtype)
    for key, (name, shape) in zip(keys, shapes.items(), strict=False)
  }
  incoming = jax.random.normal(keys[-1], case.output_shape, case.dtype)
  masking, spec = case.masking(), case.spec
  attend = functools.partial(
    api.gated_dot_product_attention,
    masking=masking,
    spec=spec,
    implementation=backend,
  )

  def forward(arrays: dict[str, Any]) -> Any:
    """The output alone."""
    # The log-sum-exp is not a result, as in evaluation.
    return attend(*Inputs(**arrays)).output

  def both(arrays: dict[str, Any], incoming: Any) -> Any:
    """The output and all gradients."""
    output, pull = jax.vjp(forward, arrays)
    return output, pull(incoming)

  ahead, whole = jax.jit(forward), jax.jit(both)
  return {
    'forward': lambda: ahead(arrays),
    'both': lambda: whole(arrays, incoming),
  }


def bench(
  shape: str,
  backend: str,
  segments: str,
  rounds: int,
  gates: Sequence[str] = GATES,
) -> Iterator[dict[str, Any]]:
  """One record for each gate and direction; gates take turns."""
  plain = case_of(shape, segments)
  made = {
    gate: functions(case_of(shape, segments, gate), backend) for gate in gates
  }
  for direction, factor in (('forward', 1.0), ('both', 3.5)):
    times = interleaved({gate: made[gate][direction] for gate in gates}, rounds)
    for gate in gates:
      seconds = times[gate]
      yield {
        'bench': 'attention',
        'shape': f'B{plain.B} T{plain.T} N{plain.N} K{plain.K} H{plain.H}',
        'dtype': plain.dtype,
        'rows': 'whole' if segments == 'none' else segments,
        'backend': backend,
        'gate': gate,
        'direction': direction,
        'ms': 1e3 * seconds.median,
        'spread': seconds.spread,
        'tflops': factor * flops(plain) / seconds.median / 1e12,
        **_overhead(times, gate),
      }


def _overhead(times: dict[str, Times], gate: str) -> dict[str, float]:
  """Time beyond that without a gate, where that was measured too."""
  if 'none' not in times:
    return {}
  return {'overhead': times[gate].median / times['none'].median - 1}


def matmul(size: int, rounds: int) -> dict[str, Any]:
  """A large product of matrices: the ceiling that utilisation is held to."""
  kind = jnp.bfloat16
  a, b = (
    jax.random.normal(key, (size, size), kind)
    for key in jax.random.split(jax.random.key(1))
  )
  product = jax.jit(jnp.matmul)
  seconds = interleaved({'matmul': lambda: product(a, b)}, rounds)['matmul']
  return {
    'bench': 'matmul',
    'shape': f'{size} x {size} x {size}',
    'dtype': 'bfloat16',
    'ms': 1e3 * seconds.median,
    'spread': seconds.spread,
    'tflops': 2 * size**3 / seconds.median / 1e12,
  }
