"""Attention sinks in a minute: a layer that has to be silent, gate by gate.

    python train.py --config=configs/backcopy.py:baseline,0 --workdir=runs/sink
    JAX_PLATFORMS=cpu python -m gated_jax.evals.sweep configs/backcopy.py \
      --devices=2 --runs=runs/backcopy
    python -m gated_jax.evals.report runs/backcopy --out=runs/report \
      --from-layer=0

Words after the colon: one of `ARMS`, then a seed, of the model and of the
sequences; the sweep makes five of each. Sequences are those of
`gated_jax/data/backcopy.py` (Guo et al., arXiv 2410.13835, here with one layer
and one head): attention is of use after 16 of 64 symbols and in the way after
the others. EXPECTED
"""

from typing import Any

from configs import base
from configs import gate_sweep

# Name to a row of `gate_sweep.py`, or of Table 4 where the paper has it.
ARMS = {
  'baseline': 'baseline',
  'elementwise': 'sdpa_elementwise',
  'headwise': 'sdpa_headwise',
  'value': 'value_elementwise',
  'parameter': 'sdpa_parameter',
  'ns_sigmoid': 'sdpa_ns_sigmoid',
  'rms_norm': 'sdpa_rms_norm',
}
SEEDS = 5


def runs(words: str = '') -> list[str]:
  """The words of every run that the given ones stand for."""
  arm, _, seed = words.partition(',')
  arms = [arm] if arm else list(ARMS)
  seeds = [seed] if seed else [str(i) for i in range(SEEDS)]
  return [f'{name},{number}' for number in seeds for name in arms]


def about(words: str) -> dict[str, Any]:
  """What a report wants to know of one run."""
  arm, seed = _parse(words)
  paper = gate_sweep.ROWS[ARMS[arm]].paper
  return {'claim': 'backcopy', 'arm': arm, 'seed': seed, 'paper': paper}


def get_config(words: str = 'elementwise,0'):
  arm, seed = _parse(words)
  config = base.get_config()
  model, data, optimizer = config.model, config.data, config.optimizer
  model.vocab = 65  # the start and 64 symbols
  model.length = data.length = 48
  model.depth = 1
  model.width = model.head_dim = 64
  model.heads = model.kv_heads = 1
  model.mlp_width = 192
  model.qk_norm = False
  model.scan = False
  model.dtype = 'float32'
  config.update_from_flattened_dict(gate_sweep.ROWS[ARMS[arm]].change)

  data.source = 'backcopy'
  data.batch = 8

  optimizer.learning_rate = 1e-2
  optimizer.final_learning_rate = 1e-3
  optimizer.warmup_steps = 50

  config.seed = data.seed = seed
  config.steps = 1000
  config.log_every = 20
  config.eval_every = config.probe_every = 100
  config.eval_batches = 16
  config.figures = False
  config.checkpoint.every = 0
  return config


def _parse(words: str) -> tuple[str, int]:
  """Arm and seed."""
  arm, _, seed = words.partition(',')
  if arm not in ARMS or not (seed or '0').isdecimal():
    raise ValueError(
      f'{words!r} must be ARM,SEED; ARM one of: {" ".join(ARMS)}'
    )
  return arm, int(seed or '0')
