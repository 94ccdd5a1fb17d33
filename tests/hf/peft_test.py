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

FILE = 'adapter_model.safetensors'
NAMES = (
  'qwen3',
  'gated_elementwise',
  'gated_headwise',
  'qwen3_next_moe',
  'qwen3_5_moe',
  'laguna',
  'step',
  'trinity',
)


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
         if re.match(rf'(.*\.)?({k})(\.weight)?$', target)),
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
  renames = [
    ('share_expert.', 'mlp.shared_experts.'),
    ('.moe.', '.mlp.experts.'),
  ]
  found = {}
  for name, x in tensors.items():
    for old, new in renames:
      name = name.replace(old, new)
    found[name] = x
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
  strip = {k.replace('language_model.', ''): x for k, x in found.items()}
  if name == 'laguna':
    strip = {k.replace('shared_experts', 'shared_expert'): x
             for k, x in strip.items()}  # fmt: skip
  assert changed == set(strip)
  for key in changed:
    np.testing.assert_allclose(strip[key], new[key] - old[key], atol=1e-5)

  # And back: the same adapters, to the bit.
  base = adapters.without(params)
  again, loaded = read.load(tmp_path / 'adapter', plain, base, family)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
