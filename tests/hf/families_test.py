"""Models of transformers, run here, sent back, and run there again.

Each is built by its own class, small and with random parameters, in every way
that its family has of saying what its layers are. Logits and gradients agree
within 1e-4, greedy tokens exactly.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gated_jax.decode.generate import generate
from gated_jax.hf import convert
from gated_jax.hf import names
from gated_jax.hf.config import find_family
from gated_jax.model.decoder import Decoder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
MISSING = "pip install -e '.[compare]' to compare with transformers"
torch = pytest.importorskip('torch', reason=MISSING)
transformers = pytest.importorskip('transformers', '5.20', reason=MISSING)

torch.set_num_threads(1)  # more only wait for each other on tiny arrays

CLOSE = 1e-4
VOCAB, LONG = 64, 150
RNG = np.random.default_rng(0)
# Without the last, which pads: torch gives its row of the embedding no gradient.
TOKENS = RNG.integers(0, VOCAB - 1, (1, LONG))
SHORT = TOKENS[:, :24]
SLOPES = RNG.normal(size=(1, 24, VOCAB)).astype(np.float32) / 8
DOCUMENTS = (37, 59, 54)  # lengths that fill a row of LONG
SIZES = {
  'vocab_size': VOCAB,
  'hidden_size': 32,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 48,
  'max_position_embeddings': 256,
}
EXPERTS = {
  'num_experts': 4,
  'num_experts_per_tok': 2,
  'moe_intermediate_size': 24,
}
TYPES = {
  'layer_types': ['full_attention', 'sliding_attention', 'full_attention'],
  'sliding_window': 6,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 5e5,
  'partial_rotary_factor': 0.5,
  'factor': 4.0,
  'original_max_position_embeddings': 64,
  'attention_factor': 1.0,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 5e6,
  'partial_rotary_factor': 0.5,
  'factor': 2.0,
  'original_max_position_embeddings': 32,
  'low_freq_factor': 1.0,
  'high_freq_factor': 8.0,
}
SLIDING = {'rope_type': 'default', 'rope_theta': 1e4}
MUSE_VISION = {
  'hidden_size': 16,
  'intermediate_size': 16,
  'num_attention_heads': 2,
  'num_hidden_layers': 1,
  'patch_size': 2,
  'patch_temporal': 1,
  'pos_emb_height': 4,
  'pos_emb_width': 4,
  'max_position_embeddings': 16,
}
STEP_VISION = {'width': 16, 'heads': 2, 'layers': 1, 'image_size': 8}
STEP = {
  **{k: v for k, v in EXPERTS.items() if k != 'num_experts'},
  **TYPES,
  'n_routed_experts': 4,
  'share_expert_dim': 20,
  'mlp_layer_types': ['dense', 'sparse', 'sparse'],
  'moe_router_scaling_factor': 1.7,
  'num_sliding_attention_heads': 6,
  'swiglu_limits': [0.0, 0.2, None],
  'swiglu_limits_shared': [0.3, 0.25, 0.0],
  'rope_parameters': {'full_attention': LLAMA3, 'sliding_attention': SLIDING},
  'pad_token_id': VOCAB - 1,
}
# Name: the class, what it is told beside the sizes, and parts that are no text.
MODELS = {
  'qwen3_biases': ('Qwen3', {'attention_bias': True}, {}),
  'qwen3_moe_mixed': (
    'Qwen3Moe',
    {
      **EXPERTS,
      'num_hidden_layers': 4,
      'decoder_sparse_step': 2,
      'mlp_only_layers': [1],
    },
    {},
  ),
  'qwen3_5_biases': (
    'Qwen3_5Text',
    {'attention_bias': True, 'layer_types': ['full_attention'] * 3},
    {},
  ),
  'laguna': (
    'Laguna',
    {
      **EXPERTS,
      **TYPES,
      'shared_expert_intermediate_size': 20,
      'num_attention_heads_per_layer': [4, 6, 2],
      'moe_routed_scaling_factor': 2.5,
      'rope_parameters': {'full_attention': YARN, 'sliding_attention': SLIDING},
    },
    {},
  ),
  'laguna_by_element': (
    'Laguna',
    {
      **EXPERTS,
      'gating': 'per-element',
      'shared_expert_intermediate_size': 20,
      'mlp_layer_types': ['sparse', 'dense', 'sparse'],
      'moe_router_logit_softcapping': 0.7,
      'attention_bias': True,
    },
    {},
  ),
  'muse_glimmer': (
    'MuseGlimmer',
    {
      'num_hidden_layers': 4,
      'sliding_window': 6,
      'output_multiplier': 0.4,
      'final_logit_softcapping': 5.0,
    },
    {
      'vision_config': MUSE_VISION,
      'out_hidden_size': 64,
      'projector_hidden_size': 16,
    },
  ),
  'step': ('Step3p7', STEP, {'vision_config': STEP_VISION}),
  'step_scaled': (
    'Step3p7',
    {**STEP, 'query_pre_attn_scalar': 12, 'layer_types': None},
    {'vision_config': STEP_VISION},
  ),
}
# They only choose experts: the loss has no gradient for them there.
CHOOSE = ('expert_bias', 'e_score_correction_bias', 'router_bias')


def build(kind, more, around):
  """A model of theirs with random parameters far from their first values."""
  sizes = SIZES | more
  if around:
    config = getattr(transformers, f'{kind}Config')(text_config=sizes, **around)
    made = getattr(transformers, f'{kind}ForConditionalGeneration')
  else:
    config = getattr(transformers, f'{kind}Config')(**sizes)
    made = transformers.AutoModelForCausalLM
  make = getattr(made, 'from_config', None) or made._from_config
  model = make(config, attn_implementation='eager')
  generator = torch.Generator().manual_seed(0)
  tensors = dict(model.named_parameters()) | {
    name: x for name, x in model.named_buffers() if name.endswith(CHOOSE)
  }
  with torch.no_grad():
    for name, p in tensors.items():
      noise = 0.2 * torch.randn(p.shape, generator=generator)
      p.copy_(p + noise if 'norm' in name else noise)
  return model.float().eval()


def run_theirs(model, tokens):
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens)).logits.numpy()


def near(found, expected, what=''):
  """Equal within CLOSE, of the largest number where that is above one."""
  scale = max(1.0, float(np.abs(expected).max()))
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=CLOSE * scale, err_msg=what
  )


@pytest.fixture(scope='module', params=MODELS)
def model(request, tmp_path_factory):
  """(theirs, its folder, our config, our parameters)."""
  theirs = build(*MODELS[request.param])
  folder = tmp_path_factory.mktemp(request.param) / 'theirs'
  theirs.save_pretrained(folder)
  return theirs, folder, *convert.load(folder)


def test_logits_alone_and_packed_are_theirs(model):
  theirs, _, config, params = model
  whole = np.ones((1, LONG), int)
  segments = np.repeat(np.arange(1, 4), DOCUMENTS)[None]
  positions = np.concatenate([np.arange(n) for n in DOCUMENTS])[None]

  @jax.jit
  def run(segments, positions):
    variables = {'params': params}
    return Decoder(config).apply(
      variables, TOKENS, segments=segments, positions=positions
    )

  long = run_theirs(theirs, TOKENS)
  ours = run(whole, np.arange(LONG)[None])
  print(f'largest difference {np.abs(ours - long).max():.1e}', end=' ')
  print(f'of {np.abs(long).max():.1f}')
  np.testing.assert_allclose(ours, long, rtol=0, atol=CLOSE)
  apart = np.split(TOKENS, np.cumsum(DOCUMENTS)[:-1], axis=1)
  alone = np.concatenate([run_theirs(theirs, x) for x in apart], axis=1)
  packed = run(segments, positions)
  np.testing.assert_allclose(packed, alone, rtol=0, atol=CLOSE)


def test_gradients_of_every_tensor_are_theirs(model, tmp_path):
  theirs, _, config, params = model
  logits = theirs(input_ids=torch.tensor(SHORT)).logits
  theirs.zero_grad()
  (logits * torch.tensor(SLOPES)).sum().backward()

  @jax.jit
  def slopes(params):
    def weighted(params):
      logits = Decoder(config).apply({'params': params}, SHORT)
      return jnp.sum(logits * SLOPES), logits

    return jax.grad(weighted, has_aux=True)(params)

  gradients, ours = slopes(params)
  near(ours, logits.detach().numpy())
  # Saved as a model, gradients have the names and shapes of files.
  kept = {name: p.detach().clone() for name, p in theirs.named_parameters()}
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.save_pretrained(tmp_path / 'gradients')
    for name, p in theirs.named_parameters():
      p.copy_(kept[name])
  expected = load_file(tmp_path / 'gradients/model.safetensors')
  flat = convert.flatten(gradients)
  family = find_family(json.loads((model[1] / 'config.json').read_text()))
  listed = names.tensors(family.rows, config, convert.shapes_of(params))
  for t in listed:
    if not t.name.endswith(CHOOSE):
      found = t.join([np.asarray(flat[leaf][t.at]) for leaf in t.leaves])
      near(found, expected[t.name], t.name)


def test_greedy_tokens_through_the_cache_are_theirs(model):
  theirs, _, config, params = model
  prompts = [SHORT[0], TOKENS[0, 40:49]]
  steps = generate(Decoder(config), params, prompts, max_tokens=8)
  ours = np.stack(list(steps), axis=1)
  for prompt, row in zip(prompts, ours, strict=True):
    tokens = prompt[None]
    for token in row:  # each by the whole text before it
      assert token == run_theirs(theirs, tokens)[0, -1].argmax()
      tokens = np.append(tokens, [[token]], axis=1)


def test_what_goes_back_is_the_same_to_the_bit_and_loads_there(model, tmp_path):
  theirs, folder, config, params = model
  family = find_family(json.loads((folder / 'config.json').read_text()))
  convert.save(tmp_path / 'back', params, config, family.name)
  before, after = (
    load_file(x / 'model.safetensors') for x in (folder, tmp_path / 'back')
  )
  for name, tensor in after.items():
    np.testing.assert_array_equal(tensor, before[name])
  again, found = convert.load(tmp_path / 'back')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, found, params)
  reopened = type(theirs).from_pretrained(
    tmp_path / 'back', attn_implementation='eager'
  )
  # The tensors are equal; where they lie in memory moves a rounding or two.
  np.testing.assert_allclose(
    run_theirs(reopened.eval(), TOKENS),
    run_theirs(theirs, TOKENS),
    rtol=0,
    atol=5e-6,
  )
