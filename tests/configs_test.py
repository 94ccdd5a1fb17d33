"""Every config is one, and builds the model that the paper describes.

Nothing is computed: parameters are counted from their shapes.
"""

import dataclasses
import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest

from configs import dense_1b7
from configs import evidence
from configs import gate_sweep
from configs import released
from gated_jax import checkpoint
from gated_jax.config import ModelConfig
from gated_jax.config import from_dict
from gated_jax.model.abstract import boxed_parameters
from gated_jax.model.parameters import about

ROOT = pathlib.Path(__file__).parents[1]
ROWS = gate_sweep.ROWS

# The words that each file takes after a colon; '' is none.
WORDS = {
  'base': [''],
  'smoke': [''],
  'dense_1b7': [
    '',
    *dense_1b7.BLOCKS,
    *(f'28,{chip}' for chip in dense_1b7.CHIPS),
    '28,3t5,v5e',
  ],
  'moe_15b_a2b': ['', 'v5e', 'v5p', 'v6e', 'tpu7x'],
  'released': ['', *released.MODELS],
  'evidence': [
    'sinks,headwise,0',
    'variants,value_shared,0,small',
    'stability,baseline,3e-3,0',
    'stability_qk,headwise_qk,2.4e-2,0',
    'stability_arms,sandwich,3e-3,0',
    'continued,baseline_qk,1',
  ],
  'gate_sweep': [
    *ROWS,
    *(f'{row},smoke' for row in ROWS if row != 'experts_132'),
  ],
  'stability': ['', 'baseline,4e-3', 'sandwich,0.03,smoke', 'headwise,smoke'],
  'long_context': [
    '',
    'base32k',
    'yarn128k',
    'base32k,smoke',
    'yarn128k,smoke',
  ],
  'sft': [''],
  'start_from': [],  # takes the folder of a checkpoint
  'lora': [],  # so does this
}
# Of so many models that tracing them takes seconds.
MANY = ('gate_sweep', 'released')

# By hand from the shapes. The authors' released 28-layer checkpoints have
# 1720.8M and, gated, 1728.2M parameters.
COUNTS = {
  'base': 1_838_015_488,
  'smoke': 894_336,
  'dense_1b7:28': 1_728_177_152,
  'dense_1b7:48': 1_715_369_472,
  'moe_15b_a2b': 15_779_078_144,
  'released:qwen3_5_35b_a3b': 34_660_610_688,
  'released:qwen3_5_9b': 8_953_803_264,
  'released:qwen3_5_27b': 26_895_998_464,
  'released:trinity_mini': 26_123_974_400,
  'evidence:sinks,baseline,0': 48_509_440,
  'evidence:sinks,headwise,0': 48_546_304,
  'gate_sweep:baseline': 15_577_751_552,
  'gate_sweep:dense28_baseline': 1_720_837_120,
  'gate_sweep:dense48_baseline': 1_705_932_288,
  'gate_sweep:dense48_headwise': 1_707_111_936,
  'stability:baseline': 1_705_932_288,
  'stability:sandwich': 1_706_079_744,
  'stability:gated': 1_715_369_472,
  'stability:headwise': 1_707_111_936,
  'long_context:yarn128k': 1_728_177_152,
}


def load(name):
  file, _, words = name.partition(':')
  get_config = importlib.import_module(f'configs.{file}').get_config
  return from_dict((get_config(words) if words else get_config()).to_dict())


@functools.cache
def boxes(config: ModelConfig):
  return boxed_parameters(config)


def shapes(config: ModelConfig):
  """Path to shape, of every parameter; a scan has as many as layers alone."""
  boxed = boxes(dataclasses.replace(config, scan=True))
  return {
    tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey)): x
    for path, x in jax.tree_util.tree_leaves_with_path(boxed)
  }


def count(config: ModelConfig) -> int:
  return sum(x.size for x in shapes(config).values())


def gate_count(config: ModelConfig) -> int:
  ends = ('attention', 'gate', 'kernel'), ('attention', 'gate', 'scores')
  found = [x for path, x in shapes(config).items() if path[-3:] in ends]
  return sum(x.size for x in found)


def test_no_config_is_left_out():
  files = {p.stem for p in (ROOT / 'configs').glob('*.py')}
  assert files - {'__init__'} == set(WORDS)


@pytest.mark.parametrize(
  'file',
  [
    pytest.param(file, marks=pytest.mark.long) if file in MANY else file
    for file in WORDS
  ],
)
def test_configs_build_models_whose_parameters_say_what_they_are(file):
  for words in WORDS[file]:
    model = load(f'{file}:{words}').model
    facts = about(boxes(dataclasses.replace(model, scan=True)))
    assert len(facts) == len(shapes(model))


@pytest.mark.parametrize(
  'name',
  [
    'dense_1b7:29',
    'dense_1b7:48,v6e',
    'dense_1b7:28,v9',
    'dense_1b7:v6e',
    'gate_sweep:',
    'gate_sweep:value',
    'gate_sweep:baseline,smaller',
    'gate_sweep:experts_132,smoke',
    'stability:sandwich,fast',
    'stability:gated,1e-3,1e-3',
    'long_context:1m',
    'evidence:sinks',
    'evidence:sinks,sandwiched,0',
    'evidence:sinks,baseline,1e-3,0',
    'evidence:stability,baseline,fast,0',
    'evidence:stability,baseline,1e-3,-1',
    'start_from:',
    'start_from:no/such/folder',
    'lora:',
  ],
)
def test_words_that_mean_nothing_are_refused(name):
  file, _, words = name.partition(':')
  module = importlib.import_module(f'configs.{file}')
  with pytest.raises(
    ValueError,
    match=r'must be|no learning rate|has no experts|say where|no checkpoint',
  ):
    module.get_config(words)


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_are_as_many_as_counted_by_hand(name):
  assert count(load(name).model) == COUNTS[name]


# The sweep is a table, with what each row adds beside it.
@pytest.mark.parametrize(
  'name', [name for name in COUNTS if not name.startswith('gate_sweep')]
)
def test_docstrings_state_how_many(name):
  file, _, _ = name.partition(':')
  text = ' '.join(importlib.import_module(f'configs.{file}').__doc__.split())
  assert f'{COUNTS[name]:,}' in text


@pytest.mark.parametrize(
  'row', [name for name, row in ROWS.items() if not row.block]
)
def test_a_row_adds_what_the_paper_says(row):
  model = load(f'gate_sweep:{row}').model
  added = count(model) - count(load('gate_sweep:baseline').model)
  if model.gate.position != 'none' and model.gate.has_scores:
    assert added == gate_count(model)
  if row == 'experts_132':  # the paper prints 400
    assert added / 1e6 == pytest.approx(453.18, abs=0.01)
  else:
    # Some columns are rounded, some cut off.
    printed = ROWS[row].paper['added']
    assert added / 1e6 == pytest.approx(printed, rel=0.01, abs=0.03)


@pytest.mark.parametrize(
  ('block', 'change', 'expected'),
  [
    # Layers x width x heads (x channels).
    ('28', {}, 28 * 2048 * 16 * 128),
    ('28', {'granularity': 'headwise'}, 28 * 2048 * 16),
    ('48', {}, 48 * 1536 * 16 * 128),
    ('48', {'granularity': 'headwise'}, 48 * 1536 * 16),
    ('48', {'position': 'value'}, 48 * 1536 * 8 * 128),
    ('48', {'position': 'dense_output'}, 48 * 1536 * 1536),
    ('28', {'source': 'parameter'}, 28 * 16 * 128),
    ('28', {'channels': 12, 'granularity': 'headwise'}, 28 * 12 * 16),
  ],
)
def test_gates_of_the_dense_models(block, change, expected):
  config = dense_1b7.get_config(block)
  config.model.gate.update(change)
  assert gate_count(from_dict(config.to_dict()).model) == expected


def test_a_chip_changes_how_the_dense_model_runs_and_not_what_it_is():
  plain = load('dense_1b7:28,3t5')
  tuned = load('dense_1b7:28,3t5,v5e')
  assert tuned.model.remat == 'minimal'
  # 2048 rows on 256 devices, two rows of each at once.
  assert tuned.optimizer.accumulate == 4
  assert plain == dataclasses.replace(
    tuned,
    model=dataclasses.replace(tuned.model, remat='full'),
    optimizer=dataclasses.replace(tuned.optimizer, accumulate=1),
  )


@pytest.mark.long
def test_arms_of_the_evidence_are_of_one_size():
  base = count(load('evidence:sinks,baseline,0').model)
  for words in evidence.runs('sinks') + evidence.runs('variants'):
    found = count(load(f'evidence:{words}').model)
    assert found == pytest.approx(base, rel=0.0011), words


def test_runs_of_the_evidence_can_be_named_by_their_first_words():
  every = evidence.runs()
  assert len(set(every)) == len(every)
  assert evidence.runs('stability,baseline,3e-3') == [
    'stability,baseline,3e-3,0'
  ]
  small = evidence.runs('sinks,headwise,small')
  assert small == [f'sinks,headwise,{seed},small' for seed in range(3)]
  for words in [*every, *small]:
    about = evidence.about(words)
    config = load(f'evidence:{words}')
    assert about['rate'] == config.optimizer.learning_rate
    assert about['seed'] == config.seed == config.data.seed
  with pytest.raises(ValueError, match='CLAIM one of: sinks'):
    evidence.runs('sinks,none')


def test_a_run_starts_from_the_model_and_the_tokenizer_of_a_checkpoint(
  tmp_path,
):
  there = load('smoke:')
  model = dataclasses.replace(there.model, norm_zero_centered=True, depth=3)
  folder = tmp_path / 'imported'
  checkpoint.save_parameters(
    folder, {'a': np.zeros(2)}, dataclasses.replace(there, model=model)
  )
  (folder / 'tokenizer').mkdir()
  (folder / 'tokenizer/tokenizer.json').write_text('{}')
  config = load(f'start_from:{folder}')
  assert config.model == model and config.init_from == str(folder)
  assert config.data.tokenizer == str(folder / 'tokenizer')
  tuned = load(f'lora:{folder}')
  assert tuned.model.lora.rank and tuned.optimizer.train == 'adapters'
  assert tuned.steps == load(f'sft:{folder}').steps == load('sft:').steps
  assert dataclasses.replace(tuned.model, lora=model.lora) == model
  folder.rename(tmp_path / 'moved')
  config = load(f'start_from:{tmp_path / "moved"}')
  assert config.data.tokenizer == str(tmp_path / 'moved/tokenizer')


def test_paired_rows_have_as_many_parameters():
  for block in ('28', '48'):
    gated, plain = (
      count(load(f'gate_sweep:dense{block}_{which}').model)
      for which in ('elementwise', 'baseline')
    )
    assert gated == pytest.approx(plain, rel=0.006)
