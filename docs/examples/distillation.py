"""A student learns the distribution of a teacher: a loss of one's own.

    total = t^2 KL(softmax(teacher / t) || softmax(student / t))

is the mean over the targets of a batch, at the temperature t (arXiv
1503.02531). The teacher is any checkpoint of the same vocabulary. As a config,

    python train.py --config=docs/examples/distillation.py:runs/smoke \
      --workdir=runs/student

this file trains a student of half the teacher's depth on the teacher's data;
`train` below does the same from Python, on numbers that count upwards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gated_jax import checkpoint
from gated_jax import config as configs
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.model.decoder import Loss
from gated_jax.training import loop


def logits(model, params, batch):
  """Of every position, each document by itself."""
  return model.apply(
    {'params': params},
    batch['tokens'],
    segments=batch['segments'],
    positions=batch['positions'],
  )


def distil(path, temperature=2.0):
  """The loss of a student whose teacher is the checkpoint at a path."""
  config = checkpoint.load_config(path).model
  teacher = checkpoint.load_parameters(path, abstract_parameters(config))

  def loss(model, params, batch, key):
    """Every mean goes over targets by their weights, so that parts add up."""
    del key  # neither of the two models draws anything
    wanted = logits(Decoder(config), teacher, batch) / temperature
    found = jax.nn.log_softmax(logits(model, params, batch) / temperature)
    weights = batch['weights']
    count = jnp.maximum(weights.sum(), 1e-9)
    apart = jnp.sum(
      jax.nn.softmax(wanted) * (jax.nn.log_softmax(wanted) - found), axis=-1
    )
    kl = jnp.sum(apart * weights) / count
    return Loss(temperature**2 * kl, kl, weights.sum(), {'kl': kl})

  return loss


def get_config(path):
  """The teacher's settings, with half of its layers and random parameters."""
  there = checkpoint.load_config(path)
  model = dataclasses.replace(there.model, depth=there.model.depth // 2)
  student = dataclasses.replace(there, model=model, init_from='')
  return ml_collections.ConfigDict(configs.to_dict(student))


def get_loss(path):
  """What train.py minimises in place of the model's own loss."""
  return distil(path)


def batches(rows, length, seed=0):
  """Rows that count upwards from a random number, modulo 20."""
  random = np.random.default_rng(seed)
  ones = np.ones((rows, length), np.int32)
  while True:
    counts = random.integers(0, 20, (rows, 1)) + np.arange(length + 1)
    ids = (counts % 20).astype(np.int32)
    yield {
      'tokens': ids[:, :-1],
      'targets': ids[:, 1:],
      'segments': ones,
      'positions': ones.cumsum(1) - 1,
      'weights': ones.astype(np.float32),
    }


def settings(depth, steps):
  """A small model of a depth, and a run of some steps."""
  model = configs.ModelConfig(
    vocab=20, depth=depth, width=32, heads=2, kv_heads=1, head_dim=16,
    mlp_width=64, length=16,
  )  # fmt: skip
  return configs.RunConfig(
    model=model,
    steps=steps,
    log_every=10,
    eval_every=0,
    probe_every=0,
    figures=False,
    data=configs.DataConfig(batch=8, length=16),
    optimizer=configs.OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
  )


def train(workdir, steps=100):
  """Trains a teacher and then its student; the student's KL by step."""
  loop.run(settings(2, steps), workdir / 'teacher', data=batches(8, 16))
  found = {}

  def note(progress):
    found[progress.step] = progress.metrics['kl']

  loop.run(
    settings(1, steps),
    workdir / 'student',
    data=batches(8, 16, seed=1),
    callbacks=[note],
    loss=distil(workdir / 'teacher'),
  )
  return found
