"""Against transformers: the same logits and gradients, both directions.

What models of Qwen3 can say of themselves. Layers of linear attention and the
other families are in families_test.py.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gated_jax.hf import convert
from gated_jax.hf import names
from gated_jax.hf.config import family_named
from gated_jax.model.decoder import Decoder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
MISSING = "pip install -e '.[compare]' to compare with transformers"
torch = pytest.importorskip('torch', reason=MISSING)
transformers = pytest.importorskip('transformers', '5.0', reason=MISSING)

torch.set_num_threads(1)  # more only wait for each other on tiny arrays

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))
SLOPES = np.random.default_rng(1).normal(size=(2, 24, 64)).astype(np.float32)
SIZES = {
  'vocab_size': 64,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 48,
  'max_position_embeddings': 32,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 1e4,
  'factor': 4.0,
  'original_max_position_embeddings': 8,
}
FULL = {'layer_types': ['full_attention'] * 2}
# Name: configuration class, and what it is told beside the sizes.
MODELS = {
  'qwen3': ('Qwen3Config', {'tie_word_embeddings': True}),
  'qwen3_yarn': ('Qwen3Config', {'rope_parameters': YARN}),
  'qwen3_windows': (
    'Qwen3Config',
    {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
  ),
  'qwen3_moe': (
    'Qwen3MoeConfig',
    {
      'moe_intermediate_size': 24,
      'num_experts': 4,
      'num_experts_per_tok': 2,
      'norm_topk_prob': True,
    },
  ),
  'qwen3_moe_not_normalized': (
    'Qwen3MoeConfig',
    {
      'moe_intermediate_size': 24,
      'num_experts': 4,
      'num_experts_per_tok': 3,
      'use_sliding_window': True,
      'sliding_window': 6,
    },
  ),
  'qwen3_next': ('Qwen3NextConfig', {'num_experts': 0, **FULL}),
  'qwen3_5': (
    'Qwen3_5TextConfig',
    {
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 1e5,
        'partial_rotary_factor': 0.5,
      },
      **FULL,
    },
  ),
  'afmoe': (
    'AfmoeConfig',
    {
      'num_dense_layers': 2,
      'sliding_window': 5,
      'layer_types': ['sliding_attention', 'full_attention'],
    },
  ),
}


def close(found, expected, roundings=256):
  """Equal to a few hundred roundings of the largest number."""
  eps = np.finfo(np.float32).eps
  atol = roundings * eps * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def build(kind, more):
  """A model of theirs with random parameters far from their first values."""
  config = getattr(transformers, kind)(**(SIZES | more))
  model = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation='eager'
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = 0.3 * torch.randn(p.shape, generator=generator)
      p.copy_(p + noise if 'norm' in name else noise)
  return model.eval()


def their_logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(config, params):
  return jax.jit(Decoder(config).apply)({'params': params}, TOKENS)


def our_gradients(config, params):
  """Logits, and gradients of their sum weighted by SLOPES."""

  def weighted(params):
    logits = Decoder(config).apply({'params': params}, TOKENS)
    return jnp.sum(logits * SLOPES), logits

  (_, logits), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(
    params
  )
  return np.asarray(logits), convert.flatten(gradients)


def reopen(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation='eager'
  ).eval()


def per_expert(name, gradient):
  """Experts are one tensor in memory, and one each in files."""
  prefix, _, last = name.rpartition('.')
  if last == 'gate_up_proj':
    for expert, both in enumerate(gradient):
      gate, up = np.split(both, 2)
      yield f'{prefix}.{expert}.gate_proj.weight', gate
      yield f'{prefix}.{expert}.up_proj.weight', up
  elif last == 'down_proj':
    for expert, down in enumerate(gradient):
      yield f'{prefix}.{expert}.down_proj.weight', down
  else:
    yield name, gradient


@pytest.mark.parametrize('name', MODELS)
def test_theirs_here_and_back(name, tmp_path):
  theirs = build(*MODELS[name])
  theirs.save_pretrained(tmp_path / 'theirs')
  logits = theirs(torch.tensor(TOKENS)).logits
  (logits * torch.tensor(SLOPES)).sum().backward()
  logits = logits.detach().numpy()
  slopes = {
    file_name: part
    for name, p in theirs.named_parameters()
    for file_name, part in per_expert(name, p.grad.numpy())
  }

  config, params = convert.load(tmp_path / 'theirs')
  found, gradients = our_gradients(config, params)
  close(found, logits)
  family = family_named(theirs.config.model_type.removesuffix('_text'))
  shapes = convert.shapes_of(params)
  listed = names.tensors(family.rows, config, shapes)
  assert {t.name for t in listed} == set(slopes)
  for t in listed:
    parts = [np.asarray(gradients[leaf][t.at]) for leaf in t.leaves]
    close(t.join(parts), slopes[t.name])

  convert.save(tmp_path / 'back', params, config, family.name)
  back = reopen(tmp_path / 'back')
  np.testing.assert_array_equal(their_logits(back), logits)
  before, after = theirs.config.to_dict(), back.config.to_dict()
  rope = before.pop('rope_parameters')
  assert rope == {k: after['rope_parameters'][k] for k in rope}
  assert {k: after[k] for k in SIZES} == {k: before[k] for k in SIZES}


@pytest.mark.parametrize(
  'name',
  [
    'qwen3_linear',
    'qwen3_next_whole',
    'qwen3_5',
    'qwen3_5_moe',
    'afmoe',
    'trinity',
  ],
)
def test_ours_run_there(name, cases, make_params, tmp_path):
  family, config = cases[name]
  params = make_params(config)
  convert.save(tmp_path / 'x', params, config, family)
  theirs = reopen(tmp_path / 'x')
  close(their_logits(theirs), np.asarray(our_logits(config, params)))
