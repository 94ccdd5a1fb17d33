"""What the gate does to 100M parameters, on one large GPU, in minutes a run.

    python train.py --config=configs/evidence_gpu.py:elementwise,high \
      --workdir=runs/elementwise_high

Words after the colon: baseline, headwise or elementwise (each as in the
paper's dense models: what is gated elementwise has a narrower MLP to pay for
it); then the largest learning rate, `low` or `high`, sixteen times that. Text:
the sources of every Python package installed beside this one, as bytes, in
rows of 1024. Parameters: 100,888,064 (baseline and elementwise) and 101,035,520
(headwise). Measured: docs/gpu.md.

Every step is logged, because a spike may last for one.
"""

import sysconfig

from configs import base

# MLP width, and what changes in the gate.
MODELS = {
  'baseline': (2048, {'position': 'none'}),
  'headwise': (2048, {'granularity': 'headwise'}),
  'elementwise': (1792, {}),
}
RATES = {'low': 1.5e-3, 'high': 2.4e-2}


def get_config(words: str = 'elementwise,low'):
  name, _, rate = words.partition(',')
  if name not in MODELS or (rate or 'low') not in RATES:
    raise ValueError(
      f'{words!r} must be one of {" ".join(MODELS)}, then one of: '
      f'{" ".join(f",{rate}" for rate in RATES)}'
    )
  config = base.get_config()
  model, data, optimizer = config.model, config.data, config.optimizer

  model.mlp_width, gate = MODELS[name]
  model.gate.update(gate)
  model.vocab = 257  # bytes, and what opens and closes a document
  model.length = 1024
  model.depth = 16
  model.width = 768
  model.heads = 12
  model.kv_heads = 4
  model.head_dim = 64
  model.remat = 'minimal'

  data.source = 'text'
  data.paths = sysconfig.get_paths()['purelib'] + '/**/*.py'
  data.batch = 32
  data.length = 1024
  data.validation = 0.02

  optimizer.learning_rate = RATES[rate or 'low']
  optimizer.final_learning_rate = optimizer.learning_rate / 10
  optimizer.warmup_steps = 100

  config.steps = 3000
  config.log_every = 1
  config.eval_every = 0
  config.eval_batches = 16
  config.probe_every = 100
  config.checkpoint.every = 0
  return config
