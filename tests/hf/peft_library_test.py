"""Against PEFT on transformers: the same logits, both directions."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from gated_jax.config import LoraConfig
from gated_jax.hf import convert
from gated_jax.hf.peft import read
from gated_jax.hf.peft import write
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
MISSING = "pip install -e '.[compare]' to compare with peft"
torch = pytest.importorskip('torch', reason=MISSING)
transformers = pytest.importorskip('transformers', '5.0', reason=MISSING)
peft = pytest.importorskip('peft', reason=MISSING)

torch.set_num_threads(1)

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))
# Name of the case: what PEFT is told to adapt, of modules and of parameters.
EXPERTS = ['experts.gate_up_proj', 'experts.down_proj']
ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
MADE = {
  'qwen3': ([*ATTENTION, 'up_proj', 'down_proj'], []),
  # As a module PEFT takes this gate_proj for the experts'.
  'afmoe': (ATTENTION, ['self_attn.gate_proj.weight']),
  'trinity': (['q_proj', 'o_proj'], EXPERTS),
  'qwen3_next_moe': (['q_proj', 'in_proj_qkvz', 'in_proj_ba'], EXPERTS),
  'qwen3_5_hybrid': (['q_proj', 'in_proj_qkv', 'in_proj_z', 'out_proj'], []),
  'qwen3_5_moe': (['q_proj', 'shared_expert.up_proj'], EXPERTS[1:]),
  'laguna': (['g_proj', 'o_proj'], EXPERTS),
  'step': (['g_proj', 'shared_experts.down_proj'], EXPERTS),
  'muse_glimmer': ([], ['self_attn.gate_proj.weight']),
  'olmo_hybrid': (['q_proj', 'g_proj', 'o_proj'], []),
  'muse_spark': (['pre_expert_proj', 'o_proj'], EXPERTS),
}
BASES = [
  pytest.param(x, marks=pytest.mark.nightly)
  if x in ('olmo_hybrid', 'muse_spark')
  else x
  for x in MADE
]


def close(found, expected):
  atol = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def logits_of(model):
  with torch.no_grad():
    return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def theirs(folder):
  (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
  return getattr(transformers, name).from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )


def ours(config, params):
  return jax.jit(Decoder(config).apply)({'params': params}, TOKENS)


@pytest.fixture
def base(request, cases, make_params, tmp_path):
  family, config = cases[request.param]
  params = make_params(config)
  convert.save(tmp_path / 'base', params, config, family)
  return request.param, family, config, params


@pytest.mark.parametrize('base', BASES, indirect=True)
@pytest.mark.parametrize('stabilized', [False, True])
def test_peft_loads_what_is_written(base, stabilized, tmp_path, recwarn):
  _, family, config, params = base
  lora = LoraConfig(rank=2, alpha=3.0, rank_stabilized=stabilized)
  config = dataclasses.replace(config, lora=lora)
  rng = np.random.default_rng(1)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      rng.normal(size=x.shape, scale=0.2).astype(x.dtype)
      if '_lora_' in str(path)
      else read_at(params, path)
    ),
    abstract_parameters(config),
  )
  write.save(tmp_path / 'adapter', params, config, family)
  loaded = peft.PeftModel.from_pretrained(
    theirs(tmp_path / 'base'), tmp_path / 'adapter'
  )
  expected = ours(config, params)
  close(logits_of(loaded), expected)
  plain = logits_of(theirs(tmp_path / 'base'))
  assert np.abs(plain - expected).max() > 0.01
  said = [str(w.message) for w in recwarn if 'peft' in w.category.__module__
          or 'adapter' in str(w.message)]  # fmt: skip
  assert not said, said


def read_at(tree, path):
  for part in path:
    tree = tree[part.key]
  return tree


@pytest.mark.parametrize('base', BASES, indirect=True)
def test_what_peft_saves_is_read(base, tmp_path):
  name, family, config, params = base
  modules, parameters = MADE[name]
  made = peft.get_peft_model(
    theirs(tmp_path / 'base'),
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      use_rslora=name == 'qwen3',
      target_modules=modules,
      target_parameters=parameters or None,
      rank_pattern={'o_proj': 3},
      alpha_pattern={'o_proj': 5},
    ),
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, x in made.named_parameters():
      if 'lora_' in key:
        x.copy_(0.2 * torch.randn(x.shape, generator=generator))
  made.save_pretrained(tmp_path / 'adapter')
  expected = logits_of(made)
  config, params = read.load(tmp_path / 'adapter', config, params, family)
  close(ours(config, params), expected)
  assert config.lora.alpha == 6 and config.lora.rank == 4
