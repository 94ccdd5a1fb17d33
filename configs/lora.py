"""Adapters (LoRA) on the parameters of another run, which stay as they are.

    python train.py --config=configs/smoke.py --workdir=runs/smoke
    python train.py --config=configs/lora.py:runs/smoke --workdir=runs/lora \
      --config.data.source=text --config.data.paths='notes/*.txt'

Differences to `start_from.py`: rank 16 on every matrix of the layers, gates and
experts included, with a scale of 2; AdamW on the adapters alone, at the larger
rate that they take, for 200 steps. `--config.model.lora.matrices='*/attention'`
chooses among the matrices, `--config.model.param_dtype=bfloat16` halves what a
base in float32 takes. A checkpoint that has adapters already goes on with its
own. docs/tune.md says more.

Expected on `runs/smoke`, which has seen nothing but Python, with
`--config.data.source=conversations` of `tests/conversations.jsonl` (80 seconds
on 2 CPU cores; seed 0): validation loss 1.25 nats per token of the assistant's
turns.
"""

import ml_collections

from configs import start_from
from gated_jax import checkpoint
from gated_jax.config import to_dict


def get_config(path: str = '') -> ml_collections.ConfigDict:
  """The settings for adapters on a checkpoint.

  Args:
    path: A workdir, the folder of a step, or of what was imported.
  """
  if not path:
    raise ValueError('say where to start: --config=configs/lora.py:PATH')
  config = start_from.get_config(path)
  there = checkpoint.load_config(path).model.lora
  if there.rank:
    config.model.lora.update(to_dict(there))
  else:
    config.model.lora.rank = 16
    config.model.lora.alpha = 32.0
  config.steps = 200
  config.eval_every = 100
  config.optimizer.train = 'adapters'
  config.optimizer.learning_rate = 2e-4
  config.optimizer.final_learning_rate = 2e-5
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup_steps = 20
  return config
