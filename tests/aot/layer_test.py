"""What a layer keeps for backward, and how its kernels are priced."""

import types

import pytest

from gated_jax.aot import kernels
from gated_jax.aot import layer
from gated_jax.config import ModelConfig

HEADS, CHANNELS = 16, 2048


def saved(backend, gate, remat='none'):
  config = ModelConfig(
    depth=1, gate=layer.GATES[gate], remat=remat, attention=backend
  )
  return layer.saved_bytes(*layer.layer(config))


def test_with_the_gate_inside_only_its_logits_are_kept():
  plain = saved('pallas_tpu', 'none')
  assert saved('pallas_tpu', 'headwise') - plain == 2 * HEADS
  assert saved('pallas_tpu', 'elementwise') - plain == 2 * CHANNELS
  # What remat saves by name is what it keeps: logits, output, log-sum-exp.
  few = saved('pallas_tpu', 'none', 'minimal')
  assert saved('pallas_tpu', 'elementwise', 'minimal') - few == 2 * CHANNELS


def test_kernels_cost_what_their_calls_and_heads_say():
  prices = layer.Prices('v5p', {'none': (10.0, 30.0)}, (20.0, 50.0), {}, ())
  names = ('gated_attention_forward', 'gated_attention_backward')
  kernels = [
    types.SimpleNamespace(name=name, calls=calls)
    for name, calls in zip(names, (2, 1), strict=True)
  ]
  program = types.SimpleNamespace(kernels=lambda: kernels)
  # Of two cores each has half of the heads of all rows.
  heads = layer.ROWS * 16 / 2
  found = prices.of(program, 'pallas_tpu', 'none', 16)
  assert found == pytest.approx(heads * (2 * 10 + 30))
  kernels[0].name, kernels[1].name = 'splash_mha_fwd', 'splash_mha_dkv'
  found = prices.of(program, 'splash', 'none', 16)
  assert found == pytest.approx(heads * (2 * 20 + 50))


@pytest.mark.parametrize('stack', ['', '24,'])  # alone, or of all layers
def test_the_delta_rule_costs_its_tokens_and_value_heads(stack):
  rows, heads, tokens = 2, 32, 512
  delta = {'gated_delta_forward': 5.0, 'gated_delta_backward': 7.0}
  known = {'attention': (0.0, 0.0), 'rotation': {}, 'delta': delta}
  for name, cycles in (('forward', 5.0), ('backward', 7.0)):
    kernel = types.SimpleNamespace(
      name=f'gated_delta_{name}',
      operands=(
        f'bf16[{stack}{rows},{tokens},2048]',
        f'f32[{stack}{rows},{heads},8,{tokens}]{{3,2,1,0:T(8,128)}}',
        f'f32[{rows},{heads},128,128]',
      ),
      output='',
    )
    found = kernels.price(kernel, known)
    assert found == cycles * rows * heads * tokens
    assert (
      kernels.price(kernel, {'attention': (0.0, 0.0), 'rotation': {}}) is None
    )


@pytest.mark.parametrize('stack', ['', '24,'])
@pytest.mark.parametrize(
  ('name', 'table'),
  [('delta_norm_forward', []), ('delta_filter_forward', ['s32[2,2]'])],
)
def test_kernels_around_the_delta_rule_cost_their_tokens_and_channels(
  name, table, stack
):
  known = {'rotation': {}, 'delta': {name: 1.5}}
  kernel = types.SimpleNamespace(
    name=name,
    # A filter reads the rows before its own as well.
    operands=[*table, f'bf16[{stack}2,512,4096]', 'bf16[2,16,4096]'],
    output='(bf16[2,512,4096], f32[2,8,4096])',
  )
  assert kernels.price(kernel, known) == 1.5 * 2 * 512 * 32


@pytest.mark.parametrize(
  ('sizes', 'line'),
  [
    ('16,32,128', 'should be key heads, value heads'),
    ('16,24,128,128', 'should be key heads, value heads'),
    ('16,32,64,128', 'channels that are a multiple of 128'),
  ],
)
def test_sizes_of_the_delta_rule_that_no_kernel_has_are_refused(
  sizes, line, capsys
):
  assert kernels.main([f'--delta={sizes}']) != 0
  assert line in capsys.readouterr().err


def test_chunks_of_a_split_sequence_cost_their_squares():
  parts, chunk, rows, heads = 4, 1024, 3, 2
  whole = 2 * parts * chunk
  lse = f'f32[{rows},{heads},1,{chunk}]'

  def cycles(keys, batch):
    kernel = types.SimpleNamespace(
      name='gated_attention_forward',
      operands=(f'bf16[{batch},{chunk},256]', f'bf16[{batch},{keys},128]'),
      output=lse.replace(f'[{rows}', f'[{batch}'),
    )
    return kernels.price(kernel, {'attention': (64.0, 0.0)}, whole)

  # Causal, the whole sequence is 32 squares of 2 cycles. Of these a device
  # has 2 diagonal ones, which are halves, and 7 others in two calls.
  assert cycles(chunk, 2 * rows) == rows * heads * 2 * 1.0
  assert cycles(whole, rows) == rows * heads * 7
  # All devices together compute the whole, and nothing twice.
  each = cycles(chunk, 2 * rows) + 2 * cycles(whole, rows)
  assert parts * each == rows * heads * 64
