"""Models of transformers, run here, sent back, and run there again.

Each is built by its own class, small and with random parameters, in every way
that its family has of saying what its layers are. Logits agree with theirs
within 1e-4, gradients with theirs in float64, greedy tokens exactly.
"""

import contextlib
import functools
import json
import os
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from gated_jax.decode.generate import generate
from gated_jax.hf import convert
from gated_jax.hf import names
from gated_jax.hf.config import find_family
from gated_jax.model.cache import init_cache
from gated_jax.model.decoder import Decoder

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
MISSING = "pip install -e '.[compare]' to compare with transformers"
torch = pytest.importorskip('torch', reason=MISSING)
transformers = pytest.importorskip('transformers', '5.20', reason=MISSING)

torch.set_num_threads(1)  # more only wait for each other on tiny arrays

# Programs of this size take longer to optimise than to run.
compiled = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
CLOSE = 1e-4
VOCAB, LONG = 64, 150
RNG = np.random.default_rng(0)
# Without the last, which pads: torch gives its row of the embedding no gradient.
TOKENS = RNG.integers(0, VOCAB - 1, (1, LONG))
LENGTHS = (24, LONG)
SLOPES = RNG.normal(size=(1, LONG, VOCAB)).astype(np.float32) / 8
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
# Two value heads to a key head. Heads are wide enough that few outputs are as
# small as the norm after them, which would enlarge every rounding before it.
LINEAR = {
  'layer_types': ['linear_attention', 'full_attention', 'linear_attention'],
  'linear_num_key_heads': 2,
  'linear_num_value_heads': 4,
  'linear_key_head_dim': 16,
  'linear_value_head_dim': 32,
}
# The class has some beyond this vocabulary.
NO_TOKENS = {'pad_token_id': VOCAB - 1, 'eos_token_id': None}
SHARED = {**EXPERTS, 'shared_expert_intermediate_size': 16}
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
SPARK_AUDIO = {
  'patch_sizes': [2],
  'hidden_sizes': [8],
  'depths': [1],
  'num_hidden_layers': 1,
  'out_hidden_size': 32,
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
  'qwen3_next': (
    'Qwen3Next',
    {**LINEAR, **SHARED, 'mlp_only_layers': [2], 'norm_topk_prob': False},
    {},
  ),
  'qwen3_5': ('Qwen3_5Text', LINEAR, {}),
  'qwen3_5_moe': ('Qwen3_5MoeText', {**LINEAR, **SHARED}, {}),
  'afmoe': (
    'Afmoe',
    {
      **EXPERTS,
      **TYPES,
      'num_dense_layers': 1,
      'num_shared_experts': 2,
      'route_scale': 1.7,
      'mup_enabled': True,
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
  'lfm3': (
    'Lfm3',
    {
      'num_hidden_layers': 4,
      'layer_types': [
        'conv',
        'full_attention',
        'conv',
        'sliding_attention',
      ],
      'sliding_window': 6,
      'pad_token_id': VOCAB - 1,
    },
    {},
  ),
  'lfm3_biases': (
    'Lfm3',
    {
      'layer_types': ['conv', 'sliding_attention', 'conv'],
      'sliding_window': 6,
      'conv_L_cache': 3,
      'conv_bias': True,
      'attention_bias': True,
      'use_attention_gate': False,
      'use_sandwich_norm': False,
      'tie_word_embeddings': False,
      'pad_token_id': VOCAB - 1,
    },
    {},
  ),
  'beam': (
    'Beam',
    {
      'num_hidden_layers': 4,
      'num_experts': 8,
      'num_experts_per_tok': 3,
      'moe_intermediate_size': 24,
      'n_group': 4,
      'topk_group': 2,
      'layer_types': [
        'sliding_attention',
        'full_attention',
        'sliding_attention',
        'full_attention',
      ],
      'sliding_window': 6,
      'mlp_layer_types': ['dense', 'sparse', 'sparse', 'sparse'],
      'final_logit_softcapping': 5.0,
    },
    {},
  ),
  'muse_spark': (
    'MuseSpark',
    {
      'num_hidden_layers': 2,
      # Outputs wider than elsewhere, of which few are as small as the norm after
      # them, which enlarges roundings.
      'head_dim': 16,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
      'num_local_experts': 4,
      'num_experts_per_tok': 2,
      'moe_intermediate_size': 24,
      'moe_hidden_size': 16,
      'mlp_layer_types': ['dense', 'sparse'],
      'routed_scaling_factor': 1.7,
      'sliding_window': 6,
      'output_multiplier': 0.4,
      'final_logit_softcapping': 5.0,
    },
    {
      'vision_config': MUSE_VISION,
      'audio_config': SPARK_AUDIO,
      'out_hidden_size': 64,
      'projector_hidden_size': 16,
    },
  ),
  'olmo_hybrid': (
    'OlmoHybrid',
    {
      **LINEAR,
      'num_hidden_layers': 2,
      'layer_types': ['linear_attention', 'full_attention'],
      'rope_parameters': {'rope_theta': None},
      **NO_TOKENS,
    },
    {},
  ),
  'olmo_hybrid_rope': (
    'OlmoHybrid',
    {
      **LINEAR,
      'layer_types': ['linear_attention'] * 2 + ['full_attention'],
      'linear_allow_neg_eigval': False,
      'attention_bias': True,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
      **NO_TOKENS,
    },
    {},
  ),
  'step': ('Step3p7', STEP, {'vision_config': STEP_VISION}),
  'step_scaled': (
    'Step3p7',
    {**STEP, 'query_pre_attn_scalar': 12, 'layer_types': None},
    {'vision_config': STEP_VISION},
  ),
}
# Further ways of saying it; each family has a model beside these.
MORE = (
  'qwen3_5_biases',
  'laguna_by_element',
  'lfm3_biases',
  'olmo_hybrid_rope',
  'step_scaled',
)
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


def save(model, folder):
  """Saves a model as its authors do.

  Transformers 5.24 cuts the filters of Olmo-Hybrid into equal thirds, and gives
  a norm of one kind of layer the name that it has in the other.
  """
  model.save_pretrained(folder)
  if model.config.model_type != 'olmo_hybrid':
    return
  file = folder / 'model.safetensors'
  tensors = load_file(file)
  for name in list(tensors):
    layer, _, kind = name.partition('linear_attn.q_conv1d.')
    if kind:
      at = [f'{layer}linear_attn.{x}_conv1d.{kind}' for x in 'qkv']
      rows = [len(tensors[x.replace('conv1d', 'proj')]) for x in at]
      joined = np.concatenate([tensors[x] for x in at])
      parts = np.split(joined, np.cumsum(rows)[:-1])
      tensors |= dict(zip(at, parts, strict=True))
    layer, _, kind = name.partition('post_feedforward_layernorm')
    if kind:
      norm = tensors.pop(f'{layer}feedforward_layer_norm{kind}')
      tensors[f'{layer}post_attention_layernorm{kind}'] = norm
  save_file(tensors, file, {'format': 'pt'})


def run_theirs(model, tokens):
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens)).logits.numpy()


def near(found, expected, what=''):
  """Equal within CLOSE, of the largest number where that is above one."""
  scale = max(1.0, float(np.abs(expected).max()))
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=CLOSE * scale, err_msg=what
  )


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=pytest.mark.nightly) if name in MORE else name
    for name in MODELS
  ],
)
def model(request, tmp_path_factory):
  """(theirs, its folder, our config, our parameters)."""
  theirs = build(*MODELS[request.param])
  folder = tmp_path_factory.mktemp(request.param) / 'theirs'
  save(theirs, folder)
  return theirs, folder, *convert.load(folder)


def test_logits_alone_and_packed_are_theirs(model):
  theirs, _, config, params = model
  whole = np.ones((1, LONG), int)
  segments = np.repeat(np.arange(1, 4), DOCUMENTS)[None]
  positions = np.concatenate([np.arange(n) for n in DOCUMENTS])[None]

  @compiled
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


@contextlib.contextmanager
def widened(model):
  """The model in float64, where its code would go back to float32 too."""

  class Wide:
    """Torch, with the wider dtype under the narrower one's names."""

    float = float32 = torch.float64

    def __getattr__(self, name):
      return getattr(torch, name)

  module = sys.modules[type(model).__module__]
  narrow = {name: x.clone() for name, x in model.state_dict().items()}
  # Products of several experts at once have no float64.
  model.set_experts_implementation('eager')
  with (
    mock.patch.object(module, 'torch', Wide()),
    mock.patch.object(torch.Tensor, 'float', torch.Tensor.double),
  ):
    yield model.double()
  model.float().load_state_dict(narrow)


def their_slopes(model, tokens, folder):
  """Logits, and gradients of their weighted sum by the names of files."""
  model.zero_grad()
  with widened(model):
    logits = model(input_ids=torch.tensor(tokens)).logits
    assert logits.dtype == torch.float64
    weights = torch.tensor(SLOPES[:, : tokens.shape[1]]).double()
    (logits * weights).sum().backward()
    # Saved as a model, gradients are cut and named as its files are.
    with torch.no_grad():
      for p in model.parameters():
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
      save(model, folder)
  model.zero_grad()
  return logits.detach().numpy(), load_file(folder / 'model.safetensors')


@pytest.mark.parametrize('length', LENGTHS)
def test_logits_and_gradients_of_every_tensor_are_theirs(
  length, model, tmp_path
):
  theirs, folder, config, params = model
  tokens, weights = TOKENS[:, :length], SLOPES[:, :length]

  @compiled
  def slopes(params):
    def weighted(params):
      logits = Decoder(config).apply({'params': params}, tokens)
      return jnp.sum(logits * weights), logits

    return jax.grad(weighted, has_aux=True)(params)

  gradients, ours = slopes(params)
  flat = convert.flatten(gradients)
  logits, expected = their_slopes(theirs, tokens, tmp_path / 'gradients')
  near(ours, logits)
  family = find_family(json.loads((folder / 'config.json').read_text()))
  listed = names.tensors(family.rows, config, convert.shapes_of(params))
  compared = [t for t in listed if not t.name.endswith(CHOOSE)]
  largest = 0.0
  for t in compared:
    found = t.join([np.asarray(flat[leaf][t.at]) for leaf in t.leaves])
    near(found, expected[t.name], t.name)
    scale = max(1.0, np.abs(expected[t.name]).max())
    largest = max(largest, np.abs(found - expected[t.name]).max() / scale)
  print(f'gradients of {length} tokens: {largest:.1e}', end=' ')


def test_greedy_tokens_through_the_cache_are_theirs(model):
  theirs, _, config, params = model
  prompts = [TOKENS[0, :length] for length in LENGTHS]
  steps = generate(Decoder(config), params, prompts, max_tokens=8)
  step = compiled(Decoder(config).apply)
  for prompt, row in zip(prompts, np.stack(list(steps), 1), strict=True):
    # Again, in parts that divide nothing, then token by token.
    cache = init_cache(config, 1, 256)
    parts = np.split(prompt[None], [7, 23], axis=1)
    tokens = prompt[None]
    for token in row:
      # Theirs, by the whole text before it.
      assert token == run_theirs(theirs, tokens)[0, -1].argmax()
      for part in parts:
        logits, cache = step({'params': params}, part, cache=cache)
      assert token == np.argmax(logits[0, -1])
      parts = [token[None, None]]
      tokens = np.append(tokens, *parts, axis=1)


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
