"""The dense 1.7B models, gated: 28 layers of 2048 or 48 layers of 1536.

    python train.py --config=configs/dense_1b7.py:48 --workdir=runs/dense48 \
      --config.data.paths='/data/*.parquet' \
      --config.data.tokenizer=/data/tokenizer.json

Paper: arXiv 2505.06708, Table 7 (sizes) and section 3 (training). The word
after the colon is a block of its Table 2, here with the gated perplexity:

    28      28 layers, 400B tokens, 1024 rows   7.404 (ungated 7.499)
    28,3t5  28 layers, 3.5T tokens, 2048 rows   6.130 (ungated 6.180)
    48      48 layers, 400B tokens, 1024 rows   7.288 (ungated 7.421)
    48,1t   48 layers, 1T tokens, 4096 rows     7.101 (ungated 7.363)

Its text is not public; these figures were not measured here. The gated models
have a narrower MLP to pay for the gate: 1,728,177,152 parameters (28) and
1,715,369,472 (48). Ungated they are 1,720,837,120 and 1,705,932,288, with

    --config.model.gate.position=none --config.model.mlp_width=6144    (28)
    --config.model.gate.position=none --config.model.mlp_width=4608    (48)

Hardware: a TPU pod, sized beforehand by `python -m gated_jax.aot`
(docs/tpu_vm.md). A chip as one more word (`28,v6e`, `28,3t5,tpu7x`) takes the
recomputation that was quickest there of what was compiled for 256 devices,
and as many rows at once as fit (docs/tpu.md). Without it all is recomputed,
which fits any of them. The 48 layers have no such choice yet.

    v5e  v5p  v6e  tpu7x

For the speed alone, without any text:

    --config.data.source=synthetic --config.data.paths=
    --config.data.tokenizer=bytes
"""

from configs import base

# Layers, width, MLP width. 5504 is what the authors' released 28-layer
# checkpoint has; the paper prints neither. 3968 follows from the same rule:
# 4608 less the gate's parameters, rounded up to a multiple of 128.
SIZES = {'28': (28, 2048, 5504), '48': (48, 1536, 3968)}

# Tokens, rows of a batch, largest learning rate (Table 2).
BLOCKS = {
  '28': (400e9, 1024, 4.0e-3),
  '28,3t5': (3.5e12, 2048, 4.5e-3),
  '48': (400e9, 1024, 4.0e-3),
  '48,1t': (1e12, 4096, 5.3e-3),
}

# What 28 layers do not recompute, and rows of a device that they take at once.
CHIPS = {
  'v5e': ('minimal', 2),
  'v5p': ('minimal', 4),
  'v6e': ('minimal', 4),
  'tpu7x': ('minimal', 4),
}
DEVICES = 256


def get_config(words: str = '28'):
  block, chip = words, ''
  if words.rpartition(',')[2] in CHIPS:
    block, _, chip = words.rpartition(',')
  if block not in BLOCKS or (chip and not block.startswith('28')):
    raise ValueError(
      f'{words!r} must be one of: {" ".join(BLOCKS)}, with 28 followed by one '
      f'of ,{" ,".join(CHIPS)} or not'
    )
  config = base.get_config()
  model, data, optimizer = config.model, config.data, config.optimizer

  model.depth, model.width, model.mlp_width = SIZES[block[:2]]
  model.heads = 16
  model.kv_heads = 8
  model.head_dim = 128
  model.vocab = 152_064  # of the released checkpoints
  model.length = 4096
  model.remat = 'full'

  tokens, data.batch, optimizer.learning_rate = BLOCKS[block]
  if chip:
    model.remat, rows = CHIPS[chip]
    optimizer.accumulate = data.batch // (DEVICES * rows)
  data.length = 4096
  config.steps = round(tokens / (data.batch * data.length))
  # Warm-up and schedule are the mixture of experts'; the paper does not say
  # what the dense runs had. Betas, decay and clipping are ours: it has
  # AdamW's "default values".
  optimizer.warmup_steps = 1000
  optimizer.final_learning_rate = 3e-5

  data.source = 'parquet'
  data.paths = 'data/*.parquet'
  data.tokenizer = 'data/tokenizer.json'
  data.validation = 0.01
  data.shuffle_tokens = 1 << 24
  config.eval_batches = 1
  config.eval_every = config.probe_every = 1000
  config.checkpoint.every = 1000
  return config
