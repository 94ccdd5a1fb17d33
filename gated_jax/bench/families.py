"""Tokens a second of a small model of every family of released models.

Each has 8 layers of width 256 with every kind of layer that its family has, in
float32. Decoding is greedy, one row after a prompt; training is whole updates
of four rows. The families take turns, so that what a round costs one of them it
costs all.
"""

import dataclasses
import gc
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta

from gated_jax import sharding
from gated_jax.bench.timing import summary
from gated_jax.config import DataConfig
from gated_jax.config import DeltaConfig
from gated_jax.config import GateConfig
from gated_jax.config import ModelConfig
from gated_jax.config import MoEConfig
from gated_jax.config import RopeConfig
from gated_jax.config import RunConfig
from gated_jax.decode.generate import generate
from gated_jax.decode.weights import for_decoding
from gated_jax.model.accounting import parameters
from gated_jax.model.decoder import Decoder
from gated_jax.training.build import make_functions

PROMPT, NEW = 32, 64
ROWS, LENGTH = 4, 256
PLAIN = ModelConfig(
  vocab=8192,
  length=1024,
  depth=8,
  width=256,
  heads=4,
  kv_heads=2,
  head_dim=64,
  mlp_width=768,
  tie_embeddings=False,
  dtype='float32',
  gate=GateConfig(position='none'),
)
GATE, BY_HEAD = GateConfig(), GateConfig(granularity='headwise')
EXPERTS = MoEConfig(experts=8, top_k=2, width=256)
SHARED = dataclasses.replace(EXPERTS, shared_width=256)
SCORED = dataclasses.replace(SHARED, score='sigmoid', bias=True)
DELTA = {
  'norm_zero_centered': True,
  'gate': GATE,
  'rope': RopeConfig(fraction=0.25),
  'delta': DeltaConfig(2, 4, key_dim=64, value_dim=64),
}
LINEAR = ('gated_deltanet',) * 3 + ('attention',)
SPARSE = tuple(f'{word}+moe' for word in LINEAR)
WINDOW = 'attention:window=128'
MUSE = {
  'norm': 'sandwich',
  'norm_zero_centered': True,
  'final_norm_plain': True,
  'post_norm_eps': 1e-8,
  'qk_norm_scale': False,
  'embed_norm': True,
  'output_scale': 0.2,
  'logit_softcap': 20.0,
  'gate': GATE,
}
# What each family's small model has beside the plain one.
FAMILIES: dict[str, dict[str, Any]] = {
  'qwen3': {},
  'qwen3_moe': {'pattern': ('attention+moe',), 'moe': EXPERTS},
  'gated_qwen3': {'gate': GATE},
  'qwen3_5': {**DELTA, 'pattern': LINEAR},
  'qwen3_5_moe': {
    **DELTA,
    'pattern': SPARSE,
    'moe': dataclasses.replace(SHARED, shared_gate=True),
  },
  'qwen3_next': {
    **DELTA,
    'pattern': SPARSE,
    'moe': dataclasses.replace(SHARED, shared_gate=True, normalize=False),
  },
  'afmoe': {
    'norm': 'sandwich',
    'gate': GATE,
    'embed_scale': 16.0,
    'lead': (WINDOW, WINDOW, f'{WINDOW}+moe', 'attention:nope+moe'),
    'pattern': (f'{WINDOW}+moe',) * 3 + ('attention:nope+moe',),
    'moe': SCORED,
  },
  'muse_glimmer': {
    **MUSE,
    'query_scale': 3.87,
    'pattern': (WINDOW,) * 3 + ('attention:nope',),
  },
  'laguna': {
    'gate': dataclasses.replace(BY_HEAD, activation='softplus'),
    'lead': ('attention',),
    'pattern': (f'{WINDOW},heads=6+moe',),
    'moe': SCORED,
  },
  'step': {
    'norm_zero_centered': True,
    'gate': BY_HEAD,
    'lead': ('attention', f'{WINDOW},heads=6'),
    'pattern': (f'{WINDOW},heads=6+moe', 'attention+moe:limit=7.0'),
    'moe': SCORED,
  },
  'lfm3': {
    'norm': 'sandwich',
    'tie_embeddings': True,
    'gate': BY_HEAD,
    'rope': RopeConfig(base=1e6, fraction=0.5, scaling='proportional'),
    'lead': ('short_conv', 'short_conv', 'attention', 'short_conv'),
    'pattern': (
      f'{WINDOW},rope_base=10000.0,rope_fraction=1.0,rope_scaling=none',
      'short_conv',
      'attention',
      'short_conv',
    ),
  },
  'beam': {
    'norm': 'sandwich',
    'residual': 'depth_scaled',
    'query_growth': 0.1,
    'logit_softcap': 30.0,
    'gate': dataclasses.replace(GATE, bias=True, bias_by_head=True),
    'lead': (WINDOW, WINDOW, 'attention:nope', f'{WINDOW}+moe'),
    'pattern': (f'{WINDOW}+moe', 'attention:nope+moe'),
    'moe': dataclasses.replace(
      EXPERTS, score='sigmoid', bias=True, groups=4, top_groups=2
    ),
  },
  'olmo_hybrid': {
    'qk_norm_joint': True,
    'delta': DeltaConfig(
      4, 4, key_dim=48, value_dim=96, norm_eps=1e-5, doubled_beta=True
    ),
    'pattern': (*LINEAR[:3], 'attention:nope,norm=post'),
  },
  'muse_spark': {
    **MUSE,
    'query_scale': 5.47,
    'head_norm': True,
    'mixer_post_scale': 'none',
    'ffn_post_scale': 'before',
    'residual': 'gated',
    'residual_temperature': 0.3,
    'pattern': (f'{WINDOW}+moe',) * 3 + ('attention:nope+moe',),
    'moe': dataclasses.replace(
      EXPERTS,
      score='sigmoid',
      bias=True,
      reduced_width=128,
      output_norm=True,
      logit_scale=0.2,
      router_dtype='float32',
    ),
  },
}


def model_of(family: str) -> ModelConfig:
  """The small model of a family."""
  return dataclasses.replace(PLAIN, **FAMILIES[family])


class Decoding:
  """Greedy decoding of one row."""

  def __init__(self, config: ModelConfig):
    tokens = np.zeros((1, 1), np.int32)
    made = jax.jit(Decoder(config).init)(jax.random.key(0), tokens)
    config, self.params = for_decoding(config, meta.unbox(made['params']))
    self.model = Decoder(config)
    self.prompt = np.random.default_rng(0).integers(0, config.vocab, PROMPT)

  def turn(self, clock: Callable[[], float]) -> float:
    """Seconds of a step, those of the prompt left out."""
    prompts = [self.prompt.astype(np.int32)]
    steps = generate(self.model, self.params, prompts, max_tokens=NEW + 1)
    next(steps)
    start = clock()
    for _ in steps:
      pass
    return (clock() - start) / NEW


class Training:
  """Updates of a model: loss, gradients, clipping, AdamW."""

  def __init__(self, config: ModelConfig):
    config = dataclasses.replace(config, length=LENGTH)
    data = DataConfig(source='synthetic', batch=ROWS, length=LENGTH)
    run = RunConfig(model=config, data=data)
    self.mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
    shape = (2, ROWS, LENGTH)
    numbers = np.random.default_rng(0).integers(0, config.vocab, shape)
    tokens, targets = numbers.astype(np.int32)
    self.batch: dict[str, Any] = {
      'tokens': tokens,
      'targets': targets,
      'segments': None,
      'positions': None,
      'weights': np.ones(shape[1:], np.float32),
    }
    self.key = jax.random.key(0)
    with sharding.activate(self.mesh):
      abstract, self.init, step = make_functions(
        run, Decoder(config), self.mesh
      )
      self.step = step.lower(abstract, self.batch).compile()

  def turn(self, clock: Callable[[], float]) -> float:
    """Seconds of a step, the second from a fresh state."""
    with sharding.activate(self.mesh):
      state, _ = self.step(self.init(self.key), self.batch)
      jax.block_until_ready(state)
      start = clock()
      state, _ = self.step(state, self.batch)
      jax.block_until_ready(state)
      return clock() - start


def bench(
  families: Sequence[str], rounds: int, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
  """One record for each family.

  Args:
    families: names of FAMILIES.
    rounds: how often their turns come, after one that is not counted.
    clock: seconds.
  """
  made: dict[str, tuple[Decoding | Training, ...]] = {
    name: (Decoding(model_of(name)), Training(model_of(name)))
    for name in families
  }
  samples: dict[str, tuple[list[float], list[float]]] = {
    name: ([], []) for name in made
  }
  for turn in range(rounds + 1):
    for name, pair in made.items():
      for runner, seconds in zip(pair, samples[name], strict=True):
        found = runner.turn(clock)
        if turn:
          seconds.append(found)
        gc.collect()
  for name, (decoding, training) in samples.items():
    step, update = summary(decoding), summary(training)
    yield {
      'bench': 'families',
      'family': name,
      'parameters': parameters(model_of(name))['total'],
      'decode': 1 / step.median,
      'decode_spread': step.spread,
      'train': ROWS * LENGTH / update.median,
      'train_spread': update.spread,
    }
