"""What the bench counts and makes up; its speeds are nobody's promise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gated_jax.bench import __main__ as bench
from gated_jax.bench import attention
from gated_jax.bench import profile
from gated_jax.bench import step
from gated_jax.bench import timing
from gated_jax.model.accounting import flops_per_token

TINY = step.Workload(model='tiny', batch=3, length=16)


def test_a_median_is_no_mean_and_the_spread_is_between_the_extremes():
  found = timing.summary([1.0, 9.0, 2.0])
  assert found == (2.0, 1.0, 9.0)
  assert found.spread == 4.0


def test_flops_of_attention_are_those_of_the_models_own_account():
  case = attention.case_of('4k')
  config = dataclasses.replace(step.MODELS['1b7'], depth=1)
  trained = flops_per_token(config, case.T)['attention'] * case.B * case.T
  # Forward and twice that backward; the bench's 3.5 makes the logits again.
  np.testing.assert_allclose(3 * attention.flops(case), trained, rtol=1e-12)


def test_packed_rows_count_positions_from_each_documents_start():
  batch = dataclasses.replace(TINY, rows='packed', length=64).batch_of()
  segments, positions = batch['segments'], batch['positions']
  assert segments.max() > 1
  for row in range(len(segments)):
    for t in range(64):
      same = t and segments[row, t] == segments[row, t - 1]
      expected = positions[row, t - 1] + 1 if same else 0
      assert positions[row, t] == expected


@pytest.mark.parametrize('gate', attention.GATES)
def test_a_workload_is_a_run_with_that_gate(gate):
  run = dataclasses.replace(TINY, gate=gate, depth=1).run()
  assert run.model.depth == 1
  assert run.model.gate.has_scores == (gate != 'none')
  if gate != 'none':
    assert run.model.gate.granularity == gate


@pytest.mark.parametrize(
  ('name', 'shape'),
  [('4k', (8, 4096)), ('tiny', (1, 64)), ('1024', (32, 1024))],
)
def test_shapes_have_as_many_tokens_whatever_their_length(name, shape):
  assert attention.shape_of(name) == shape


@pytest.mark.parametrize('flag', ['--shapes=4k,4kk', '--gates=none,twice'])
def test_a_flag_that_means_nothing_is_named(flag, capsys):
  assert bench.main(['attention', flag]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert repr(flag.split(',')[-1]) in error


@pytest.mark.nightly
def test_attention_is_measured_with_every_gate_both_ways(capsys):
  arguments = ['attention', '--shapes=tiny', '--backends=xla', '--rounds=1']
  assert bench.main([*arguments, '--matmul=32']) == 0
  lines = capsys.readouterr().out.splitlines()
  records = [json.loads(line) for line in lines if line.startswith('{')]
  assert [r['bench'] for r in records] == ['matmul'] + 6 * ['attention']
  assert {(r['gate'], r['direction']) for r in records[1:]} == {
    (gate, way) for gate in attention.GATES for way in ('forward', 'both')
  }
  assert all(r['ms'] > 0 for r in records)


@pytest.mark.nightly
def test_a_step_is_measured_against_the_first_of_its_workloads():
  works = {
    gate: dataclasses.replace(TINY, gate=gate, scan=True)
    for gate in ('none', 'elementwise')
  }
  plain, gated = step.bench(works, rounds=1, steps=1, ceiling=1e12)
  assert plain['overhead'] == 0 and gated['more_flops'] > 0
  assert gated['losses'][0] == pytest.approx(np.log(300), abs=0.1)
  assert gated['memory_gib'] > 0
  assert jax.devices()[0].platform != 'gpu' or plain['mfu'] > 0


def test_kernels_are_sorted_into_groups_by_name():
  assert profile.group_of('nvjet_sm90_tst_128x160') == 'products'
  assert profile.group_of('cudnn_generated_fort_native_sdpa') == 'attention'
  assert profile.group_of('memcpy128') == 'copies'
  assert profile.group_of('input_reduce_fusion_2') == 'reductions'
  assert profile.group_of('loop_multiply_fusion') == 'elementwise'


@pytest.mark.nightly
def test_families_are_measured_by_turns(capsys):
  arguments = ['families', '--only=qwen3', '--rounds=1', '--cpu_time']
  assert bench.main(arguments) == 0
  (line,) = [x for x in capsys.readouterr().out.splitlines() if '{' in x]
  record = json.loads(line)
  assert record['family'] == 'qwen3'
  assert min(record['decode'], record['train']) > 0
  assert bench.main(['families', '--only=qwen4']) == 2
