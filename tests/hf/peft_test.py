"""Adapters in PEFT's form say of each of their matrices what ours compute."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from gated_jax import checkpoint
from gated_jax.config import DataConfig
from gated_jax.config import LoraConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.hf import __main__ as cli
from gated_jax.hf import convert
from gated_jax.hf.peft import read
from gated_jax.hf.peft import write
from gated_jax.model import adapters
from gated_jax.model.abstract import abstract_parameters

FILE = 'adapter_model.safetensors'
# A class that can see has it in the names of its modules, not always in those
# of its files.
VISION = 'language_model.'
NAMES = (
  'gated_headwise',
  *(
    pytest.param(name, marks=pytest.mark.long)
    for name in ('laguna', 'step')
  ),
  *(
    pytest.param(name, marks=pytest.mark.nightly)
    for name in (
      'qwen3', 'gated_elementwise', 'qwen3_5_moe', 'trinity',
      'olmo_hybrid', 'muse_spark', 'qwen3_next_moe',
    )
  ),
)  # fmt: skip


def with_lora(config, **changes):
  lora = LoraConfig(**{'rank': 2, 'alpha': 3.0, **changes})
  return dataclasses.replace(config, lora=lora)


def read_folder(folder):
  settings = json.loads((folder / 'adapter_config.json').read_text())
  return settings, load_file(folder / FILE)


def deltas(settings, arrays):
  """What PEFT adds to each module, from the description of its format."""
  wrapped = {name.removesuffix('.base_layer') for name in names(arrays)
             if name.endswith('.base_layer')}  # fmt: skip
  found = {}
  for name in names(arrays):
    a, b = (np.float64(arrays[f'{name}.lora_{x}.weight']) for x in 'AB')
    target = name.removeprefix('base_model.model.')
    experts = 1
    if target.endswith(('.experts', '.base_layer')):
      experts = 4
      inner = target.endswith('.base_layer') or name not in wrapped
      target = target.removesuffix('.base_layer')
      target += '.gate_up_proj' if inner else '.down_proj'
    rank = a.shape[0] // experts
    patterns = {
      key: next(
        (x for k, x in settings[key].items()
         if re.match(rf'(.*\.)?({k.replace(VISION, "")})(\.weight)?$',
                     target.replace(VISION, ''))),
        settings[default],
      )
      for key, default in (('rank_pattern', 'r'),
                           ('alpha_pattern', 'lora_alpha'))
    }  # fmt: skip
    assert rank == patterns['rank_pattern'], target
    root = rank**0.5 if settings['use_rslora'] else rank
    scale = patterns['alpha_pattern'] / root
    if experts == 1:
      found[target + '.weight'] = scale * b @ a
      continue
    a = a.reshape(experts, rank, -1)
    b = b.reshape(-1, rank, experts)
    found[target] = scale * np.einsum('ore,eri->eoi', b, a)
  return found


def names(arrays):
  return {name.rsplit('.lora_', 1)[0] for name in arrays}


def modules(tensors):
  """Tensors of a folder of theirs as the modules of transformers hold them."""
  found = {k.replace('.moe.', '.mlp.experts.'): x for k, x in tensors.items()}
  layers = {n.split('.experts.')[0] for n in found if '.experts.0.' in n}
  for layer in layers:
    for last in ('gate_proj', 'up_proj', 'down_proj'):
      found[f'{layer}.experts.{last}.weight'] = np.stack(
        [found.pop(f'{layer}.experts.{e}.{last}.weight') for e in range(4)]
      )
  for name in [n for n in found if n.endswith('.experts.down_proj.weight')]:
    layer = name.removesuffix('.down_proj.weight')
    found[f'{layer}.down_proj'] = found.pop(name)
    both = [found.pop(f'{layer}.{x}_proj.weight') for x in ('gate', 'up')]
    found[f'{layer}.gate_up_proj'] = np.concatenate(both, axis=1)
  return found


@pytest.mark.parametrize('name', NAMES)
def test_what_peft_adds_is_what_merging_adds(
  name, cases, make_params, tmp_path
):
  family, plain = cases[name]
  config = with_lora(plain, rank_stabilized=name == 'qwen3_5_moe')
  params = make_params(config)
  write.save(tmp_path / 'adapter', params, config, family)
  settings, arrays = read_folder(tmp_path / 'adapter')
  found = deltas(settings, arrays)

  merged = adapters.merge(config, params)[1]
  for folder, tree in (('old', adapters.without(params)), ('new', merged)):
    convert.save(tmp_path / folder, tree, plain, family)
  old, new = (
    modules(load_file(tmp_path / folder / 'model.safetensors'))
    for folder in ('old', 'new')
  )
  changed = {k for k in old if np.any(old[k] != new[k])}
  assert changed == set(found)
  for key in changed:
    np.testing.assert_allclose(found[key], new[key] - old[key], atol=1e-5)

  # And back: the same adapters, to the bit.
  base = adapters.without(params)
  again, loaded = read.load(tmp_path / 'adapter', plain, base, family)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.fixture(scope='module')
def small(cases_of_module, tmp_path_factory):
  """Folders of a base in both forms, and of a run with adapters on it."""
  family, plain = cases_of_module['qwen3_5']
  plain = dataclasses.replace(plain, depth=2)
  config = with_lora(plain, matrices='*/attention,!*/key', dropout=0.25)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype),
    abstract_parameters(config),
  )
  folder = tmp_path_factory.mktemp('peft')
  run = RunConfig(
    model=config,
    data=DataConfig(length=config.length),
    optimizer=OptimizerConfig(train='adapters'),
  )
  checkpoint.save_parameters(folder / 'run', params, run)
  convert.save(folder / 'base', adapters.without(params), plain, family)
  return folder, config, params


@pytest.mark.long
def test_the_command_writes_an_adapter_and_reads_it(small, tmp_path):
  folder, config, params = small
  args = ['export', '--peft', f'{folder}/run', f'{tmp_path}/adapter']
  assert cli.main([*args, '--family=qwen3_5', f'--base={folder}/base']) == 0
  settings, arrays = read_folder(tmp_path / 'adapter')
  assert settings['base_model_name_or_path'] == f'{folder}/base'
  assert settings['target_modules'] == [
    f'self_attn.{x}_proj' for x in 'oqv'
  ]  # fmt: skip
  # Queries and gates have an adapter each, in the rows of one matrix.
  assert settings['rank_pattern'] == {'self_attn.q_proj': 4}
  assert settings['alpha_pattern'] == {'self_attn.q_proj': 6}
  assert len(arrays) == 2 * 3 * config.depth
  assert settings['lora_dropout'] == 0.25
  assert cli.main(['import', f'{tmp_path}/adapter', f'{tmp_path}/ours']) == 0
  again = checkpoint.load_config(tmp_path / 'ours')
  assert again.model.lora.dropout == 0.25
  assert again.optimizer.train == 'adapters'
  assert again.model.lora.scale == config.lora.scale
  loaded = checkpoint.load_parameters(
    tmp_path / 'ours', abstract_parameters(again.model)
  )
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.fixture(scope='module')
def adapter(small, tmp_path_factory):
  folder, config, params = small
  target = tmp_path_factory.mktemp('made') / 'adapter'
  write.save(target, params, config, 'qwen3_5', str(folder / 'base'))
  return read_folder(target)


def widened(arrays):
  return {
    k: np.pad(x, ((0, 0), (0, 8))) if '.lora_A' in k else x
    for k, x in arrays.items()
  }


def with_head(arrays):
  return arrays | {
    'base_model.model.lm_head.lora_A.weight': np.ones((2, 32), np.float32)
  }


def without_a_side(arrays):
  return {
    k: x for k, x in arrays.items() if not k.endswith('o_proj.lora_B.weight')
  }


@pytest.mark.parametrize(
  ('settings', 'change', 'message'),
  [
    ({}, widened, 'adapter for another base: .* is .*40.*, and this base makes'),
    ({}, with_head, 'lm_head.lora_A.weight adapts no matrix of this base'),
    ({}, without_a_side, 'o_proj.weight lacks one of its sides'),
    ({'peft_type': 'IA3'}, dict, "peft_type 'IA3'; only LORA can be read"),
    ({'use_dora': True}, dict, 'has use_dora=True, which adapters here do not'),
    ({'bias': 'all'}, dict, "has bias='all'"),
    ({'lora_dropout': 'much'}, dict, 'lora_dropout'),
    ({'r': 0}, dict, 'has r=0, which is not an integer from 1'),
    ({'lora_alpha': -1}, dict, 'lora_alpha=-1.0, which is not positive'),
    ({'init_lora_weights': 'pissa_niter_4'}, dict, 'which changes the base'),
    ({'modules_to_save': ['lm_head']}, dict, "modules_to_save=.'lm_head'."),
    ({'alpha_pattern': {'(a+)+b': 2}}, dict, r'only names with \.\* and'),
    ({'alpha_pattern': {'q_proj': 0}}, dict, 'q_proj=0, which is no positive'),
    (
      {'base_model_name_or_path': 'someone/model'},
      dict,
      'is an adapter for someone/model: say with --base=FOLDER',
    ),
  ],
)  # fmt: skip
def test_what_is_no_adapter_of_the_base_is_one_line(
  adapter, settings, change, message, tmp_path, capsys
):
  values, arrays = adapter
  folder = tmp_path / 'adapter'
  folder.mkdir()
  save_file(change(arrays), folder / FILE)
  text = json.dumps(values | settings)
  (folder / 'adapter_config.json').write_text(text)
  assert cli.main(['import', str(folder), f'{tmp_path}/ours']) == 2
  said = capsys.readouterr().err.strip()
  assert re.search(message, said) and '\n' not in said
  assert not (tmp_path / 'ours').exists()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--peft'], 'has no adapters, which --peft would write'),
    (['--peft', '--rewrite=norms'], '--rewrite changes the base'),
    (['--base=x'], '--base=x does nothing without --peft'),
  ],
)
def test_an_export_that_cannot_be_is_one_line(
  small, flags, message, tmp_path, capsys
):
  folder = small[0]
  args = ['export', *flags, f'{folder}/base', f'{tmp_path}/out']
  assert cli.main(args) == 2
  assert message in capsys.readouterr().err
