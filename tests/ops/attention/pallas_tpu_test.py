"""The TPU kernels' cutting: every pair once, any number of parts, real sizes.

What they compute is the contract test's; here blocks are far smaller than
the table's, so that every path through a long sequence is short enough to be
interpreted.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from gated_jax.ops.attention import xla
from gated_jax.ops.attention.cases import Case
from gated_jax.ops.attention.pallas_tpu import backend as pallas_tpu
from gated_jax.ops.attention.pallas_tpu import masks
from gated_jax.ops.attention.pallas_tpu.blocks import Blocks
from gated_jax.ops.attention.pallas_tpu.blocks import KernelSpec
from gated_jax.ops.attention.spec import Inputs
from gated_jax.ops.gate import GateSpec

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

SMALL = Blocks(
  queries=256,
  keys=128,
  strip=128,
  resident=256,
  back_queries=128,
  back_keys=256,
  back_strip=128,
  back_resident=256,
)


def gradients(attend, case, dtype_out=jnp.float32):
  arrays, masking = case.arrays(), case.masking()
  shape = case.output_shape
  d = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

  def loss(arrays):
    output, lse = attend(Inputs(**arrays), masking, case.spec)
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    return jnp.sum(output * d) + jnp.sum(jnp.sin(lse)), (output, lse)

  run = jax.value_and_grad(loss, has_aux=True)
  (_, results), grads = jax.jit(
    run, compiler_options={'xla_backend_optimization_level': 0}
  )(arrays)
  return *results, grads


def agrees_with_xla(attend, case):
  found, expected = gradients(attend, case), gradients(xla.attend, case)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


# More parts than one on both axes, in one call and, for the little dQ that
# `dq_mib` of these allows, in several.
LONG = {
  'causal': (Case(B=1, T=768, N=2, K=1, gate='elementwise'), {}),
  'headwise': (Case(B=1, T=512, N=2, K=2, gate='headwise'), {}),
  'window': (Case(B=1, T=768, N=1, K=1, window=300, gate='headwise'), {}),
  'short window': (Case(B=1, T=768, N=1, K=1, window=30), {}),
  'full': (Case(B=1, T=512, N=1, K=1, causal=False), {}),
  'segments': (Case(B=1, T=512, N=1, K=1, segments='blind'), {}),
  'hidden': (
    Case(B=2, T=256, S=1024, N=1, K=1, causal=False, segments='hidden'),
    {},
  ),
  'packed': (
    Case(B=2, T=768, N=2, K=1, segments='packed', gate='headwise'),
    {},
  ),
  'more keys': (Case(B=1, T=256, S=768, N=1, K=1), {}),
  'more queries': (Case(B=1, T=768, S=256, N=1, K=1), {}),
  'ranges': (
    Case(B=1, T=512, N=2, K=1, H=128, gate='headwise'),
    {'dq_mib': 0.25},
  ),
  'window in ranges': (
    Case(B=1, T=768, N=1, K=1, H=128, window=300, gate='elementwise'),
    {'dq_mib': 0.25},
  ),
  'full in ranges': (
    Case(B=1, T=1024, N=1, K=1, H=128, causal=False),
    {'dq_mib': 0.25},
  ),
}


@pytest.mark.parametrize('name', LONG)
def test_long_sequences_are_the_sum_of_their_parts(name):
  case, blocks = LONG[name]

  def attend(*arguments):
    return pallas_tpu.attend(
      *arguments, blocks=dataclasses.replace(SMALL, **blocks), interpret=True
    )

  agrees_with_xla(attend, case)


# As a TPU with two cores would: copies between memories and semaphores are
# simulated, memory that nobody wrote is not a number, and what two cores do
# to the same place without waiting for each other is found.
SIMULATED = {
  'causal': Case(B=1, T=512, N=2, K=1, H=128, gate='headwise'),
  'elementwise': Case(B=2, T=256, N=1, K=1, H=128, gate='elementwise'),
  'window': Case(B=1, T=512, N=2, K=2, H=128, window=200),
  'segments': Case(B=1, T=256, N=2, K=2, H=128, segments='blind'),
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n == 'causal' else pytest.mark.nightly)
    for n in SIMULATED
  ],
)
def test_a_simulated_tpu_finds_no_race_and_nothing_unwritten(name):
  params = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory='nan'
  )

  def attend(*arguments):
    return pallas_tpu.attend(*arguments, blocks=SMALL, interpret=params)

  agrees_with_xla(attend, SIMULATED[name])
  assert not interpret_pallas_call.races.races_found


@st.composite
def drawn(draw):
  """A call of attention, and blocks to cut it with."""
  causal = draw(st.booleans())
  length = draw(st.integers(1, 520))
  case = Case(
    B=draw(st.integers(1, 2)),
    T=length,
    S=draw(st.one_of(st.just(length), st.integers(1, 520))),
    K=(kv_heads := draw(st.integers(1, 2))),
    N=kv_heads * draw(st.integers(1, 3)),
    H=draw(st.sampled_from((6, 64, 128))),
    causal=causal,
    window=draw(st.integers(0, length + 1)) if causal else 0,
    segments=draw(st.sampled_from(('none', 'packed', 'blind'))),
    gate=draw(st.sampled_from(('none', 'headwise', 'elementwise'))),
    activation=draw(st.sampled_from(('sigmoid', 'silu', 'softplus'))),
    additive=draw(st.booleans()),
  )
  sizes = st.sampled_from((128, 256))
  return case, dataclasses.replace(
    SMALL,
    queries=draw(sizes),
    back_queries=(back := draw(sizes)),
    back_keys=256,
    back_strip=draw(st.sampled_from((128, back))),
    dq_mib=draw(st.sampled_from((0.25, 1.0))),
  )


def any_call_agrees(call):
  case, blocks = call

  def attend(*arguments):
    return pallas_tpu.attend(*arguments, blocks=blocks, interpret=True)

  agrees_with_xla(attend, case)


def test_any_call_agrees_with_plain_attention():
  quick = hypothesis.settings(
    max_examples=4, deadline=None, phases=[hypothesis.Phase.generate]
  )
  quick(hypothesis.given(drawn())(any_call_agrees))()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_many_calls_agree_with_plain_attention():
  long = hypothesis.settings(max_examples=80, deadline=None)
  long(hypothesis.given(drawn())(any_call_agrees))()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.integers(0, 5), st.integers(0, 2), st.integers(0, 1), st.integers(0, 1400)
)
def test_strips_and_steps_hold_every_visible_pair_once(a, b, c, window):
  width = 128
  step, block = width << b, width << (b + c)
  rule = masks.MaskRule(causal=True, window=window, segments=False)
  begin, length = a * block, 6 * block
  t, s = np.arange(length)[:, None], np.arange(length)[None]
  seen = (s <= t) & ((t - s < window) if window else True)
  for axis, strips, steps in (
    (0, masks.key_strips, masks.key_steps),
    (1, masks.query_strips, masks.query_steps),
  ):
    covered = np.zeros((block, length), int)
    plain = np.zeros((block, length), bool)
    early, late = (x + begin for x in steps(rule, block, step))
    inside = slice(max(early, 0), max(min(late, length), 0))
    covered[:, inside] += 1
    plain[:, inside] = True
    for strip in strips(rule, block, width, step):
      start = begin + strip.start
      if 0 <= start < length:
        covered[strip.first : strip.last, start : start + width] += 1
    rows = slice(begin, begin + block)
    visible = seen[rows] if axis == 0 else seen[:, rows].T
    assert (covered <= 1).all()
    assert covered[visible].all()
    assert visible[plain].all()


@pytest.mark.parametrize(
  'queries, keys, rule',
  [
    (256, 256, (True, 0)),
    (256, 512, (True, 0)),
    (512, 256, (True, 40)),
    (256, 512, (True, 300)),
    (512, 256, (False, 0)),
  ],
)
def test_xla_is_told_the_pairs_that_are_visible(queries, keys, rule):
  causal, window = rule
  call = KernelSpec(
    queries=queries,
    keys=keys,
    heads=2,
    kv_heads=1,
    head_dim=128,
    value_dim=256,
    scale=1.0,
    rule=masks.MaskRule(causal, window, segments=False),
    granularity='none',
    gate=GateSpec(),
    blocks=SMALL,
    interpret=False,
  )
  t, s = np.arange(queries)[:, None], np.arange(keys)[None]
  seen = np.ones((queries, keys), bool)
  seen &= (s <= t) | (not causal)
  seen &= (t - s < window) | (not window)
  array = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)
  found = [
    call.cost((3, 2), part, [array])
    for part in (range(128), range(128, queries))
  ]
  assert [x.bytes_accessed for x in found] == [30, 30]
  assert [x.flops for x in found] == [
    3 * 2 * 2 * (3 * 128 + 2 * 256) * rows.sum()
    for rows in (seen[:128], seen[128:])
  ]


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'queries': 300}, 'queries=300 must be a power of two'),
    ({'strip': 1024}, 'strip must not exceed keys'),
    ({'vmem_mib': 0}, 'vmem_mib=0 must be positive'),
  ],
)
def test_blocks_that_cannot_be_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    Blocks(**sizes)


def test_fewer_rows_of_wide_heads_lie_in_memory():
  blocks = Blocks()
  for width, rows in ((64, 4096), (128, 4096), (256, 2048)):
    assert blocks.fit(8192, 8192, width).back_resident == rows


PROGRAM = """
import sys
from gated_jax.aot import attention_kernels as kernels
kind, gate, length = sys.argv[1:]
ours = kernels.Ours(kernels.TABLE[kind])
kernels.compile_kernels(kind, ours, kernels.case_of(int(length), gate))
"""


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  'kind, gate, length',
  [
    ('v5e', 'headwise', 4096),
    ('v5e', 'elementwise', 32_768),
    ('v5p', 'elementwise', 32_768),
    ('v6e', 'elementwise', 131_072),
  ],
)
def test_real_shapes_compile_for_tpu(kind, gate, length):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'PYTHONPATH': os.pathsep.join(sys.path),
  }
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, kind, gate, str(length)],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
