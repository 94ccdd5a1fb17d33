"""Conversations, of which the assistant's turns alone are learned.

    python train.py --config=configs/sft.py --workdir=runs/sft
    python -m gated_jax.decode --checkpoint=runs/sft --chat

trains a small model from nothing on short conversations that lie in `tests/`.
To tune a model that was trained or imported, name it; its chat template, or a
plain one, writes the conversations, and its rows are as long as they were:

    python train.py --config=configs/sft.py:runs/imported --workdir=runs/tuned \
      --config.data.paths='/data/*.jsonl'

Expected for the small one (2 CPU minutes; seed 0): validation loss 0.08 nats
per token of the assistant's turns, and answers to most questions that are put
as those of the file are.
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
  if path:
    # Less than pre-training: what the model knows is to stay.
    config.steps = 1000
    config.optimizer.learning_rate = 1e-5
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_steps = 50
    return config
  config.steps = 200
  config.eval_every = 100
  config.data.batch = 8
  config.data.shuffle_tokens = 1 << 15
  return config
