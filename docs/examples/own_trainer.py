"""The trainer with an optimizer, data and a callback of one's own."""

import numpy as np
import optax

from gated_jax import config as configs
from gated_jax.training import loop


def batches(rows: int, length: int, seed: int = 0):
  """Rows that count upwards from a random number, modulo 50."""
  random = np.random.default_rng(seed)
  while True:
    counts = random.integers(0, 50, (rows, 1)) + np.arange(length + 1)
    ids = (counts % 50).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    yield {
      'tokens': ids[:, :-1],
      'targets': ids[:, 1:],
      'segments': ones,  # one document a row
      'positions': ones.cumsum(1) - 1,
      'weights': ones.astype(np.float32),
    }


def train(workdir, steps=300, goal=0.5):
  """Trains until the loss is below a goal; the losses that were logged."""
  model = configs.ModelConfig(
    vocab=50, depth=2, width=64, heads=2, kv_heads=1, head_dim=32,
    mlp_width=128, length=32,
  )  # fmt: skip
  config = configs.RunConfig(
    model=model, steps=steps, data=configs.DataConfig(batch=8, length=32)
  )
  losses = {}

  def note(progress: loop.Progress) -> bool:
    losses[progress.step] = progress.metrics['loss']
    return progress.metrics['loss'] < goal  # True: save, and end

  loop.run(
    config, workdir, optimizer=optax.adamw(3e-3), data=batches(8, 32),
    callbacks=[note],
  )  # fmt: skip
  return losses
