"""The mixture of experts of 15B parameters, about 2B of them active, gated.

    python train.py --config=configs/moe_15b_a2b.py:v5p --workdir=runs/moe \
      --config.data.paths='/data/*.parquet' \
      --config.data.tokenizer=/data/tokenizer.json

15,779,078,144 parameters, of which the gate has 201,326,592. Paper: arXiv
2505.06708, Table 7 (sizes), section 3 (training), Table 1, row 5: perplexity
5.761 (ungated 6.026), attention on the first token 0.048 (0.467). Its text is
not public; these figures were not measured here. The other rows of its tables
are in `gate_sweep.py`.

Hardware: a TPU pod, sized beforehand by `python -m gated_jax.aot`
(docs/tpu_vm.md). The word after the colon names its chip: experts are spread
over as many devices, and backward recomputes as much, as was best there of what
was compiled for 256 (docs/tpu.md). Without it every device gathers all experts,
and all is recomputed.

    v5e  v5p  v6e  tpu7x
"""

from configs import base

# Devices of a group of experts and what is recomputed, by the chip.
CHIPS = {
  '': (1, 'full'),
  'v5e': (1, 'full'),
  'v5p': (1, 'minimal'),
  'v6e': (1, 'minimal'),
  'tpu7x': (2, 'minimal'),
}


def get_config(chip: str = ''):
  if chip not in CHIPS:
    raise ValueError(f'{chip=} must be one of: {" ".join(filter(None, CHIPS))}')
  config = base.get_config()
  config.mesh.expert, config.model.remat = CHIPS[chip]
  model, data, optimizer = config.model, config.data, config.optimizer

  model.depth = 24
  model.width = 2048
  model.heads = 32
  model.kv_heads = 4
  model.head_dim = 128
  model.pattern = ('attention+moe',)
  model.moe.experts = 128
  model.moe.top_k = 8
  model.moe.width = 768
  model.tie_embeddings = False
  model.vocab = 152_064  # of the authors' released dense checkpoints
  model.length = 4096

  # 419B tokens; the paper rounds them to 400B.
  config.steps = 100_000
  data.batch = 1024
  data.length = 4096
  # Betas, decay and clipping are ours: the paper has AdamW's "default values".
  optimizer.learning_rate = 2e-3
  optimizer.final_learning_rate = 3e-5
  optimizer.warmup_steps = 1000

  data.source = 'parquet'
  data.paths = 'data/*.parquet'
  data.tokenizer = 'data/tokenizer.json'
  data.validation = 0.01
  data.shuffle_tokens = 1 << 24
  config.eval_batches = 1
  config.eval_every = config.probe_every = 1000
  config.checkpoint.every = 1000
  return config
