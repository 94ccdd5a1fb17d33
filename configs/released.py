"""Released gated models at their sizes, to be trained or sized for a pod.

    python -m gated_jax.aot --config=configs/released.py:trinity_mini \
      --topology=v5p:4x8x8

The word after the colon names the model:

    qwen3_5_35b_a3b  34,660,610,688 parameters: Gated DeltaNet in three of four
                     layers, 256 experts and a shared one in each
    qwen3_5_9b       8,953,803,264 parameters, dense
    qwen3_5_27b      26,895,998,464 parameters, dense
    trinity_mini     26,123,974,400 parameters: AFMoE with 128 experts

Sizes: for Qwen3.5's mixture the defaults of its class in transformers, for its
dense model and for Trinity the config.json of the released folders. They are
counts of the language model alone. Learning rates are ours. Weights of a
released folder come by `python -m gated_jax.hf import`, and are trained on by
`configs/start_from.py`; this file makes new ones, for which it needs nothing.

Hardware: a TPU pod; docs/models.md has the compiler's figures.
"""

from configs import base

WINDOW = 'attention:window=2048'
DELTA = {'gated_deltanet': 3, 'attention': 1}


def _hybrid(suffix=''):
  """Three layers of Gated DeltaNet to one of attention."""
  return tuple(word + suffix for word, n in DELTA.items() for _ in range(n))


QWEN3_5 = {
  'vocab': 248_320,
  'norm_zero_centered': True,
  'tie_embeddings': False,
  'head_dim': 256,
  'rope.base': 1e7,
  'rope.fraction': 0.25,
}
MODELS = {
  'qwen3_5_35b_a3b': {
    **QWEN3_5,
    'depth': 40,
    'width': 2048,
    'heads': 16,
    'kv_heads': 2,
    'pattern': _hybrid('+moe'),
    'moe.experts': 256,
    'moe.top_k': 8,
    'moe.width': 512,
    'moe.shared_width': 512,
    'moe.shared_gate': True,
    'moe.balance_loss': 1e-3,
  },
  'qwen3_5_9b': {
    **QWEN3_5,
    'depth': 32,
    'width': 4096,
    'heads': 16,
    'kv_heads': 4,
    'mlp_width': 12_288,
    'pattern': _hybrid(),
    'delta.value_heads': 32,
  },
  'qwen3_5_27b': {
    **QWEN3_5,
    'depth': 64,
    'width': 5120,
    'heads': 24,
    'kv_heads': 4,
    'mlp_width': 17_408,
    'pattern': _hybrid(),
    'delta.value_heads': 48,
  },
  'trinity_mini': {
    'vocab': 200_192,
    'tie_embeddings': False,
    'norm': 'sandwich',
    'norm_eps': 1e-5,
    'embed_scale': 2048**0.5,
    'depth': 32,
    'width': 2048,
    'heads': 32,
    'kv_heads': 4,
    'head_dim': 128,
    'mlp_width': 6144,
    # Two dense layers, and two more so that the rest is whole fours.
    'lead': (WINDOW, WINDOW, f'{WINDOW}+moe', 'attention:nope+moe'),
    'pattern': (f'{WINDOW}+moe',) * 3 + ('attention:nope+moe',),
    'moe.experts': 128,
    'moe.top_k': 8,
    'moe.width': 1024,
    'moe.shared_width': 1024,
    'moe.score': 'sigmoid',
    'moe.bias': True,
    'moe.scale': 2.826,
  },
}


def get_config(word='qwen3_5_35b_a3b'):
  if word not in MODELS:
    raise ValueError(f'there is no {word!r}; there are {", ".join(MODELS)}')
  config = base.get_config()
  config.model.update_from_flattened_dict(MODELS[word])
  config.model.length = config.data.length = 4096
  config.model.remat = 'full'
  config.data.batch = 1024
  config.optimizer.learning_rate = 3e-4
  config.optimizer.final_learning_rate = 3e-5
  config.optimizer.warmup_steps = 1000
  config.steps = 100_000
  return config
