"""python -m gated_jax.hf, and hf/rewrites.py: the same function afterwards."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax.config import GateConfig
from gated_jax.config import RunConfig
from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.hf import rewrites
from gated_jax.hf import tokenizer
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder

# Together most of a minute or more; see CONTRIBUTING.md.
pytestmark = pytest.mark.long

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16))


def logits(config, params):
  return np.asarray(jax.jit(Decoder(config).apply)({'params': params}, TOKENS))


def close(found, expected):
  eps = np.finfo(np.float32).eps
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=256 * eps * scale)


def run(*args):
  return cli.main([str(x) for x in args])


@pytest.fixture
def theirs(cases, make_params, tmp_path):
  family, config = cases['qwen3']
  config = dataclasses.replace(config, param_dtype='bfloat16')
  convert.save(tmp_path / 'theirs', make_params(config), config, family)
  tokenizer.write_bytes(tmp_path / 'theirs', config.length)
  return tmp_path / 'theirs'


def test_import_then_export_gives_the_same_files(theirs, tmp_path, capsys):
  assert run('import', theirs, tmp_path / 'ours', '--mesh=fsdp=4,data=2') == 0
  assert '4 layers, 35,168 parameters' in capsys.readouterr().out
  assert run('export', tmp_path / 'ours', tmp_path / 'back') == 0
  names = {p.name for p in theirs.iterdir()}
  tokens = {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'}
  assert names == {'config.json', 'model.safetensors', *tokens}
  for name in names:
    a, b = (x / name for x in (theirs, tmp_path / 'back'))
    assert a.read_bytes() == b.read_bytes(), name


def test_an_imported_model_is_exported_as_the_family_that_it_was(
  cases, make_params, tmp_path
):
  # Qwen3.5 describes this one too, and is tried before.
  family, config = cases['qwen3_next_hybrid']
  convert.save(tmp_path / 'theirs', make_params(config), config, family)
  # As transformers leaves it where it has no tokenizer.
  (tmp_path / 'theirs/generation_config.json').write_text('{}')
  run('import', tmp_path / 'theirs', tmp_path / 'ours')
  assert checkpoint.load_config(tmp_path / 'ours').export_as == 'qwen3_next'
  assert run('export', tmp_path / 'ours', tmp_path / 'back') == 0
  for name in ('config.json', 'model.safetensors'):
    a, b = (tmp_path / x / name for x in ('theirs', 'back'))
    assert a.read_bytes() == b.read_bytes(), name
  flag = '--family=qwen3_5'
  assert run('export', tmp_path / 'ours', tmp_path / 'other', flag) == 0
  values = json.loads((tmp_path / 'other/config.json').read_text())
  assert values['model_type'] == 'qwen3_5_text'


def test_what_was_imported_is_a_checkpoint_to_start_a_run_from(
  theirs, tmp_path
):
  run('import', theirs, tmp_path / 'ours')
  config = checkpoint.load_config(tmp_path / 'ours')
  assert config.data.tokenizer == str(tmp_path / 'ours/tokenizer')
  wide = dataclasses.replace(config.model, param_dtype='float32')
  params = checkpoint.load_parameters(
    tmp_path / 'ours', abstract_parameters(wide)
  )
  _, expected = convert.load(theirs, param_dtype='float32')
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('granularity', ['elementwise', 'headwise'])
def test_an_added_gate_changes_no_logit(granularity, theirs, tmp_path):
  flag = f'--granularity={granularity}'
  assert run('add-gate', theirs, tmp_path / 'gated', flag) == 0
  config = checkpoint.load_config(tmp_path / 'gated').model
  assert config.gate.granularity == granularity
  params = checkpoint.load_parameters(
    tmp_path / 'gated', abstract_parameters(config)
  )
  before = logits(*convert.load(theirs))
  np.testing.assert_array_equal(logits(config, params), before)


def test_a_gate_that_is_there_is_not_added(cases, make_params):
  _, config = cases['gated_headwise']
  with pytest.raises(ValueError, match=r"gate\.position='sdpa_output'"):
    rewrites.add_gate(config, make_params(config))


def test_help_of_add_gate_states_the_negative_result(capsys):
  with pytest.raises(SystemExit):
    run('add-gate', '--help')
  text = ' '.join(capsys.readouterr().out.split())
  assert 'no gain (arXiv 2505.06708, appendix A.7)' in text


def two_sigmoid(granularity):
  return GateConfig(granularity=granularity, activation='two_sigmoid')


@pytest.mark.parametrize(
  ('rewrite', 'gate', 'exact'),
  [
    ('two_sigmoid', two_sigmoid('headwise'), True),
    ('two_sigmoid', two_sigmoid('elementwise'), True),
    ('headwise', GateConfig(granularity='headwise'), False),
    ('norms', GateConfig(), False),
  ],
)
def test_rewrites_keep_the_function(rewrite, gate, exact, cases, make_params):
  config = dataclasses.replace(cases['gated_elementwise'][1], gate=gate)
  params = make_params(config)
  found = logits(*rewrites.REWRITES[rewrite](config, params))
  check = np.testing.assert_array_equal if exact else close
  check(found, logits(config, params))


def test_rewrites_refuse_what_they_do_not_fit(cases, make_params):
  _, config = cases['gated_elementwise']
  params = make_params(config)
  for name, message in [
    ('two_sigmoid', r"gate\.activation='sigmoid'"),
    ('headwise', r"gate\.granularity='elementwise'"),
  ]:
    with pytest.raises(ValueError, match=message):
      rewrites.REWRITES[name](config, params)


def test_norm_scales_come_back_as_they_were(cases, make_params):
  _, config = cases['gated_elementwise']
  params = make_params(config)
  there = rewrites.move_norm_scales(config, params)
  back, found = rewrites.move_norm_scales(*there)
  assert back == config
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    found,
    params,
  )


def test_a_headwise_run_can_be_exported_for_current_transformers(
  cases, make_params, tmp_path
):
  model = dataclasses.replace(
    cases['qwen3'][1], gate=two_sigmoid('headwise'), length=256
  )
  checkpoint.save_parameters(
    tmp_path / 'run/checkpoints/7', make_params(model), RunConfig(model=model)
  )
  assert run('export', tmp_path / 'run', tmp_path / 'x') == 2
  words = [f'--rewrite={x}' for x in ('two_sigmoid', 'headwise', 'norms')]
  assert run('export', tmp_path / 'run', tmp_path / 'x', *words) == 0
  values = json.loads((tmp_path / 'x/config.json').read_text())
  assert values['model_type'] == 'qwen3_5_text'
  close(
    logits(*convert.load(tmp_path / 'x')), logits(model, make_params(model))
  )


def test_errors_are_one_line_and_leave_nothing(theirs, tmp_path, capsys):
  values = json.loads((theirs / 'config.json').read_text())
  bad = values | {'hidden_act': 'gelu'}
  (theirs / 'config.json').write_text(json.dumps(bad))
  for args, message in [
    (('import', theirs, tmp_path / 'x'), "hidden_act='gelu'"),
    (('import', tmp_path / 'none', tmp_path / 'x'), 'there is no folder'),
    (('export', tmp_path, tmp_path / 'x'), 'no checkpoint at'),
    (('import', theirs, tmp_path / 'x', '--mesh=wide'), '--mesh=wide must be'),
    (('import', theirs, tmp_path / 'x', '--mesh=x=2'), 'no setting mesh.x'),
    (('import', theirs, theirs), 'exists; choose another name'),
  ]:
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
  assert [p.name for p in tmp_path.iterdir()] == ['theirs']


def test_a_failure_to_copy_leaves_nothing(theirs, tmp_path, monkeypatch):
  def full(*_):
    raise OSError('no space left on device')

  monkeypatch.setattr(tokenizer.paths, 'write_bytes', full)
  assert run('import', theirs, tmp_path / 'x') == 1
  assert [p.name for p in tmp_path.iterdir()] == ['theirs']
