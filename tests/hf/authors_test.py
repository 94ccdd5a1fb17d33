"""The authors' layout, against float64 NumPy written from its description.

Rows of q_proj are grouped by kv head: the group's queries, then its gates.
Nothing here is shared with what is tested: tensors are made in their layout.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gated_jax.hf import convert
from gated_jax.hf import rewrites
from gated_jax.model.decoder import Decoder

VOCAB, WIDTH, LAYERS, HEADS, KV, SIZE, MLP = 50, 24, 2, 6, 2, 8, 40
GROUP = HEADS // KV
BASE, EPS = 10_000.0, 1e-6
GATES = {'elementwise': GROUP * SIZE, 'headwise': GROUP, 'none': 0}
CONFIG = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 0,
  'head_dim': SIZE,
  'hidden_act': 'silu',
  'hidden_size': WIDTH,
  'initializer_range': 0.02,
  'intermediate_size': MLP,
  'max_position_embeddings': 64,
  'max_window_layers': LAYERS,
  'model_type': 'qwen2',
  'num_attention_heads': HEADS,
  'num_hidden_layers': LAYERS,
  'num_key_value_heads': KV,
  'qkv_bias': False,
  'rms_norm_eps': EPS,
  'rope_scaling': None,
  'rope_theta': BASE,
  'sliding_window': None,
  'tie_word_embeddings': True,
  'torch_dtype': 'float32',
  'use_qk_norm': True,
  'use_sliding_window': False,
  'vocab_size': VOCAB,
}
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 19))


def make_tensors(gate, biases=False):
  rng = np.random.default_rng(3)

  def matrix(rows, columns):
    return (rng.normal(size=(rows, columns)) * 0.3).astype(np.float32)

  def scale(size):
    return rng.uniform(0.6, 1.9, size).astype(np.float32)

  tensors = {
    'model.embed_tokens.weight': matrix(VOCAB, WIDTH),
    'model.norm.weight': scale(WIDTH),
  }
  for i in range(LAYERS):
    layer = {
      'input_layernorm': scale(WIDTH),
      'post_attention_layernorm': scale(WIDTH),
      'self_attn.q_proj': matrix(KV * (GROUP * SIZE + GATES[gate]), WIDTH),
      'self_attn.k_proj': matrix(KV * SIZE, WIDTH),
      'self_attn.v_proj': matrix(KV * SIZE, WIDTH),
      'self_attn.o_proj': matrix(WIDTH, HEADS * SIZE),
      'self_attn.q_norm': scale(SIZE),
      'self_attn.k_norm': scale(SIZE),
      'mlp.gate_proj': matrix(MLP, WIDTH),
      'mlp.up_proj': matrix(MLP, WIDTH),
      'mlp.down_proj': matrix(WIDTH, MLP),
    }
    tensors |= {f'model.layers.{i}.{k}.weight': v for k, v in layer.items()}
    for name in 'qkvo' if biases else '':
      rows = len(layer[f'self_attn.{name}_proj'])
      bias = rng.normal(size=rows).astype(np.float32)
      tensors[f'model.layers.{i}.self_attn.{name}_proj.bias'] = bias
  return tensors


def write(folder, tensors, **config):
  folder.mkdir()
  save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(CONFIG | config))


def flags(gate):
  return {
    f'{kind}_attn_output_gate': kind == gate
    for kind in ('headwise', 'elementwise')
  }


def rms(x, weight):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def turn(x):
  """Rotary embedding of [T, SIZE], channel c with channel c + SIZE/2."""
  half = SIZE // 2
  angle = np.arange(len(x))[:, None] * BASE ** (-np.arange(half) / half)
  a, b = x[:, :half], x[:, half:]
  return np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      b * np.cos(angle) + a * np.sin(angle),
    ],
    axis=1,
  )


def attention(x, weight, gate):
  rows, keys, values = (
    x @ weight(f'self_attn.{n}_proj').T + weight(f'self_attn.{n}_proj', 'bias')
    for n in 'qkv'
  )
  keys, values = (y.reshape(len(x), KV, SIZE) for y in (keys, values))
  rows = rows.reshape(len(x), KV, -1)
  heads = []
  for g in range(KV):
    key = turn(rms(keys[:, g], weight('self_attn.k_norm')))
    for r in range(GROUP):
      query = rows[:, g, r * SIZE : (r + 1) * SIZE]
      query = turn(rms(query, weight('self_attn.q_norm')))
      scores = query @ key.T / np.sqrt(SIZE)
      scores[np.triu_indices(len(x), 1)] = -np.inf
      scores = np.exp(scores - scores.max(1, keepdims=True))
      out = scores / scores.sum(1, keepdims=True) @ values[:, g]
      gates = rows[:, g, GROUP * SIZE :]
      if gate == 'elementwise':
        out = out * sigmoid(gates[:, r * SIZE : (r + 1) * SIZE])
      elif gate == 'headwise':
        out = out * sigmoid(gates[:, r : r + 1])
      heads.append(out)
  heads = np.concatenate(heads, axis=1)
  return heads @ weight('self_attn.o_proj').T + weight(
    'self_attn.o_proj', 'bias'
  )


def forward(tensors, gate):
  wide = {name: t.astype(np.float64) for name, t in tensors.items()}
  found = []
  for tokens in TOKENS:
    x = wide['model.embed_tokens.weight'][tokens]
    for i in range(LAYERS):

      def weight(name, kind='weight', i=i):
        return wide.get(f'model.layers.{i}.{name}.{kind}', 0.0)

      x = x + attention(rms(x, weight('input_layernorm')), weight, gate)
      h = rms(x, weight('post_attention_layernorm'))
      up, in_ = h @ weight('mlp.up_proj').T, h @ weight('mlp.gate_proj').T
      x = x + (in_ * sigmoid(in_) * up) @ weight('mlp.down_proj').T
    logits = (
      rms(x, wide['model.norm.weight']) @ wide['model.embed_tokens.weight'].T
    )
    found.append(logits)
  return np.stack(found)


def close(found, expected):
  eps = np.finfo(np.float32).eps
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=256 * eps * scale)


def our_logits(config, params):
  return jax.jit(Decoder(config).apply)({'params': params}, TOKENS)


def resorted(tensors):
  """Each query head's rows beside its gate's, norm scales less one."""
  found = {}
  for name, t in tensors.items():
    if 'q_proj' in name:
      t = t.reshape(KV, 2, GROUP, SIZE, WIDTH).transpose(0, 2, 1, 3, 4)
      t = t.reshape(2 * HEADS * SIZE, WIDTH)
    elif 'norm' in name:
      t = t - np.float32(1)
    found[name] = np.ascontiguousarray(t)
  return found


NEXT = {
  'architectures': ['Qwen3NextForCausalLM'],
  'model_type': 'qwen3_next',
  'layer_types': ['full_attention'] * LAYERS,
  'partial_rotary_factor': 1.0,
  'num_experts': 0,
}
AUTHORS_ALONE = ('qkv_bias', 'use_qk_norm', 'use_sliding_window')


def write_resorted(folder, tensors):
  absent = dict.fromkeys((*AUTHORS_ALONE, 'max_window_layers'))
  write(folder, resorted(tensors), **NEXT, **absent)


@pytest.mark.parametrize(
  'biases',
  [
    pytest.param(False, id=''),
    pytest.param(True, id='biases', marks=pytest.mark.long),
  ],
)
@pytest.mark.parametrize('gate', GATES)
def test_logits_are_those_of_the_description(gate, biases, tmp_path):
  tensors = make_tensors(gate, biases)
  write(tmp_path / 'x', tensors, **flags(gate), qkv_bias=biases)
  config, params = convert.load(tmp_path / 'x')
  close(our_logits(config, params), forward(tensors, gate))
  convert.save(tmp_path / 'back', params, config, 'gated_qwen3')
  first, second = (tmp_path / x / 'model.safetensors' for x in ('x', 'back'))
  again, _ = convert.load(tmp_path / 'back')
  assert again == config
  assert _tensors(first) == _tensors(second)


def _tensors(path):
  from safetensors.numpy import load_file

  return {k: (v.shape, v.tobytes()) for k, v in load_file(path).items()}


def test_resorted_rows_are_the_layout_of_qwen3_next(tmp_path):
  tensors = make_tensors('elementwise')
  write(tmp_path / 'x', tensors, **flags('elementwise'))
  write_resorted(tmp_path / 'next', tensors)
  config, params = rewrites.move_norm_scales(*convert.load(tmp_path / 'x'))
  next_config, next_params = convert.load(tmp_path / 'next')
  assert next_config == config
  jax.tree.map(np.testing.assert_array_equal, next_params, params)
  close(our_logits(config, params), forward(tensors, 'elementwise'))


def test_transformers_computes_the_description_from_resorted_rows(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers', minversion='5.0')
  tensors = make_tensors('elementwise')
  write(tmp_path / 'x', tensors, **flags('elementwise'))
  model = rewrites.move_norm_scales(*convert.load(tmp_path / 'x'))
  convert.save(tmp_path / 'next', *reversed(model), family='qwen3_next')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'next')
  with torch.no_grad():
    logits = theirs(torch.tensor(TOKENS)).logits.numpy()
  close(logits, forward(tensors, 'elementwise'))


def test_both_gates_at_once_are_refused(tmp_path):
  both = {f'{x}_attn_output_gate': True for x in ('headwise', 'elementwise')}
  write(tmp_path / 'x', make_tensors('headwise'), **both)
  with pytest.raises(ValueError, match=r'both elementwise.* and headwise'):
    convert.load(tmp_path / 'x')


def test_the_other_gate_has_other_shapes_and_is_named(tmp_path):
  write(tmp_path / 'x', make_tensors('headwise'), **flags('elementwise'))
  with pytest.raises(ValueError, match=r'layers\.0\.self_attn\.q_proj.*96, 24'):
    convert.load(tmp_path / 'x')
