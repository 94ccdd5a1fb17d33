"""Tiny models of every family, with random parameters."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from gated_jax.config import ConvConfig
from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.model.abstract import abstract_parameters

PLAIN = ModelConfig(
  vocab=64,
  length=32,
  depth=4,
  width=32,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_width=48,
  tie_embeddings=False,
  dtype='float32',
  gate=GateConfig(position='none'),
)


def plain(**changes):
  return dataclasses.replace(PLAIN, **changes)


GATE = GateConfig()
HEADWISE = GateConfig(granularity='headwise')
QUARTER = RopeConfig(fraction=0.25)
YARN = RopeConfig(
  base=1e6, scaling='yarn', factor=4.0, original_length=8, beta_fast=16.0
)
DELTA = DeltaConfig(2, 4, key_dim=8, value_dim=6)
NEXT = {'norm_zero_centered': True, 'gate': GATE}
SHARED = MoEConfig(
  experts=4, top_k=2, width=24, shared_width=16, shared_gate=True
)
OWN_ROPE = 'rope_base=100.0,rope_fraction=1.0,rope_scaling=none'
SCORED = MoEConfig(
  experts=4,
  top_k=2,
  width=24,
  shared_width=20,
  score='sigmoid',
  bias=True,
  scale=1.7,
)
SPARK = {
  'norm': 'sandwich',
  'norm_zero_centered': True,
  'final_norm_plain': True,
  'post_norm_eps': 1e-8,
  'mixer_post_scale': 'none',
  'ffn_post_scale': 'before',
  'residual': 'gated',
  'residual_temperature': 0.3,
  'qk_norm_scale': False,
  'head_norm': True,
  'query_scale': 5.47,
  'embed_norm': True,
  'output_scale': 0.2,
  'logit_softcap': 20.0,
  'gate': GATE,
}
# Name of the case: family and model.
CASES = {
  'qwen3': ('qwen3', plain()),
  'qwen3_tied': ('qwen3', plain(tie_embeddings=True)),
  'qwen3_windows': (
    'qwen3',
    plain(pattern=('attention', 'attention:window=5')),
  ),
  'qwen3_yarn': ('qwen3', plain(rope=YARN)),
  'qwen3_linear': (
    'qwen3',
    plain(rope=RopeConfig(scaling='linear', factor=2.0)),
  ),
  'qwen3_moe': (
    'qwen3_moe',
    plain(
      pattern=('attention+moe',),
      moe=MoEConfig(experts=4, top_k=2, width=24),
    ),
  ),
  'qwen3_moe_window': (
    'qwen3_moe',
    plain(
      pattern=('attention:window=6+moe',),
      moe=MoEConfig(experts=4, top_k=3, width=24, normalize=False),
    ),
  ),
  'gated_elementwise': ('gated_qwen3', plain(gate=GATE)),
  'gated_headwise': ('gated_qwen3', plain(gate=HEADWISE, kv_heads=1)),
  'gated_baseline': ('gated_qwen3', plain(qk_norm=False)),
  'qwen3_next': ('qwen3_next', plain(**NEXT, rope=QUARTER)),
  'qwen3_next_whole': ('qwen3_next', plain(**NEXT, tie_embeddings=True)),
  'qwen3_5': ('qwen3_5', plain(**NEXT, rope=QUARTER, kv_heads=4)),
  'qwen3_5_hybrid': (
    'qwen3_5',
    plain(
      **NEXT,
      rope=QUARTER,
      delta=DELTA,
      pattern=('gated_deltanet',) * 3 + ('attention',),
    ),
  ),
  'qwen3_next_hybrid': (
    'qwen3_next',
    plain(
      **NEXT,
      rope=QUARTER,
      delta=DELTA,
      pattern=('gated_deltanet', 'attention'),
    ),
  ),
  'qwen3_5_moe': (
    'qwen3_5_moe',
    plain(
      **NEXT,
      rope=QUARTER,
      delta=DELTA,
      pattern=('gated_deltanet+moe', 'attention+moe'),
      moe=SHARED,
    ),
  ),
  'qwen3_next_moe': (
    'qwen3_next',
    plain(
      **NEXT,
      rope=QUARTER,
      delta=DELTA,
      pattern=('gated_deltanet', 'gated_deltanet+moe', 'attention+moe'),
      depth=6,
      moe=dataclasses.replace(SHARED, normalize=False),
    ),
  ),
  'afmoe': (
    'afmoe',
    plain(
      norm='sandwich',
      gate=GATE,
      pattern=('attention:window=6',) * 3 + ('attention:nope',),
    ),
  ),
  'qwen3_moe_mixed': (
    'qwen3_moe',
    plain(
      lead=('attention',),
      pattern=('attention+moe',),
      moe=MoEConfig(experts=4, top_k=2, width=24),
    ),
  ),
  'gated_biases': (
    'gated_qwen3',
    plain(
      gate=GateConfig(granularity='headwise', bias=True),
      qkv_bias=True,
      out_bias=True,
    ),
  ),
  'muse_glimmer': (
    'muse_glimmer',
    plain(
      norm='sandwich',
      norm_zero_centered=True,
      final_norm_plain=True,
      post_norm_eps=1e-8,
      qk_norm_scale=False,
      query_scale=3.87,
      embed_norm=True,
      output_scale=0.2,
      logit_softcap=20.0,
      gate=GATE,
      pattern=('attention:window=6', 'attention:nope'),
    ),
  ),
  'laguna': (
    'laguna',
    plain(
      gate=GateConfig(granularity='headwise', activation='softplus'),
      rope=dataclasses.replace(YARN, fraction=0.5),
      lead=('attention', f'attention:window=6,{OWN_ROPE},heads=6+moe'),
      pattern=('attention+moe',),
      moe=dataclasses.replace(SCORED, softcap=0.7),
    ),
  ),
  'step': (
    'step',
    plain(
      norm_zero_centered=True,
      gate=HEADWISE,
      rope=RopeConfig(
        base=5e6,
        fraction=0.5,
        scaling='llama3',
        factor=2.0,
        original_length=8,
        high_turns=8.0,
      ),
      pattern=(
        'attention+mlp:limit=16.0',
        f'attention:window=6,{OWN_ROPE},heads=6+moe',
        'attention+moe',
        'attention+moe:limit=7.0,shared_limit=16.0',
      ),
      moe=SCORED,
    ),
  ),
  'beam': (
    'beam',
    plain(
      norm='sandwich',
      residual='depth_scaled',
      query_growth=0.1,
      logit_softcap=20.0,
      gate=GateConfig(bias=True, bias_by_head=True),
      lead=('attention:window=6',),
      pattern=('attention:nope+moe', 'attention:window=6+moe'),
      depth=5,
      moe=MoEConfig(
        experts=8,
        top_k=3,
        width=24,
        score='sigmoid',
        bias=True,
        scale=2.5,
        groups=4,
        top_groups=2,
      ),
    ),
  ),
  'lfm3': (
    'lfm3',
    plain(
      norm='sandwich',
      tie_embeddings=True,
      gate=HEADWISE,
      rope=RopeConfig(fraction=0.5, scaling='proportional'),
      conv=ConvConfig(filter_width=4, bias=True),
      pattern=(
        'short_conv',
        'attention',
        'short_conv',
        f'attention:window=6,{OWN_ROPE}',
      ),
    ),
  ),
  'lfm3_pre_norm': (
    'lfm3',
    plain(
      gate=HEADWISE,
      conv=ConvConfig(filter_width=3),
      pattern=('short_conv', 'attention'),
    ),
  ),
  'muse_spark': (
    'muse_spark',
    plain(
      **SPARK,
      pattern=('attention:window=6', 'attention:nope+moe'),
      moe=MoEConfig(
        experts=4,
        top_k=2,
        width=24,
        reduced_width=16,
        output_norm=True,
        router_dtype='float32',
        score='sigmoid',
        logit_scale=0.2,
        bias=True,
        scale=1.7,
      ),
    ),
  ),
  'muse_spark_dense': (
    'muse_spark',
    plain(**SPARK, pattern=('attention:nope', 'attention:window=6')),
  ),
  'olmo_hybrid': (
    'olmo_hybrid',
    plain(
      kv_heads=4,
      qk_norm_joint=True,
      delta=dataclasses.replace(DELTA, doubled_beta=True, norm_eps=1e-5),
      pattern=('gated_deltanet', 'attention:nope,norm=post'),
    ),
  ),
  'olmo_hybrid_rope': (
    'olmo_hybrid',
    plain(
      qk_norm_joint=True,
      delta=dataclasses.replace(DELTA, norm_eps=1e-5),
      rope=RopeConfig(base=500.0),
      pattern=('attention:norm=post', 'gated_deltanet'),
    ),
  ),
  'trinity': (
    'afmoe',
    plain(
      norm='sandwich',
      gate=GATE,
      embed_scale=math.sqrt(32),
      lead=('attention:window=6', 'attention:nope+moe'),
      pattern=('attention:window=6+moe',),
      moe=MoEConfig(
        experts=4,
        top_k=2,
        width=24,
        shared_width=48,
        score='sigmoid',
        bias=True,
        scale=1.7,
      ),
    ),
  ),
}


@pytest.fixture(params=CASES)
def case(request):
  """(family, config) of every case."""
  return CASES[request.param]


@pytest.fixture
def cases():
  return CASES


@pytest.fixture(scope='module')
def cases_of_module():
  return CASES


@pytest.fixture
def make_params():
  """A function from config to random NumPy parameters, norms about one."""

  def make(config, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
      values = rng.normal(size=abstract.shape) * 0.3
      if 'norm' in jax.tree_util.keystr(path) and not config.norm_zero_centered:
        values += 1
      return values.astype(abstract.dtype)

    abstract = abstract_parameters(config)
    return jax.tree_util.tree_map_with_path(leaf, abstract)

  return make
