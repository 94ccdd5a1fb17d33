"""Conversations, of which the assistant's turns alone are learned.

    python train.py --config=configs/sft.py --workdir=runs/sft
    python -m gated_jax.decode --checkpoint=runs/sft --chat

trains a small model from nothing on short conversations that lie in `tests/`.
To tune a model that was trained or imported, name it; its chat template, or a
plain one, writes the conversations, and its rows are as long as they were:

    python train.py --config=configs/sft.py:runs/imported --workdir=runs/tuned \
      --config.data.paths='/data/*.jsonl'

Expected for the small one (80 seconds on 2 CPU cores; seed 0): validation loss
0.08 nats per token of the assistant's turns, and answers to most questions that
are put as those of the file are. On the model of `configs/smoke.py`, at the
lower rate that what was trained takes: 2.69.
"""

import ml_collections

from configs import smoke
from configs import start_from


def get_config(path: str = '') -> ml_collections.ConfigDict:
  """The settings for a run on conversations.

  Args:
    path: Where to start: a workdir, the folder of a step, or of what was
      imported; '': a small model that knows nothing.
  """
  config = start_from.get_config(path) if path else smoke.get_config()
  config.data.source = 'conversations'
  config.data.paths = 'tests/conversations.jsonl'
  config.data.rows = 'whole'
  config.data.targets = 'assistant'
  config.steps = 200
  config.eval_every = 100
  if path:
    # Less than pre-training: what the model knows is to stay.
    config.optimizer.learning_rate = 1e-5
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_steps = 50
    return config
  config.data.batch = 8
  config.data.shuffle_tokens = 1 << 15
  return config
