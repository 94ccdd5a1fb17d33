"""Attention sinks in a minute or two on a CPU, gate by gate.

    python docs/examples/backcopy.py

Bigram-backcopy (Guo et al., arXiv 2410.13835; `gated_jax/data/backcopy.py`):
one layer with one head, of use after 16 of 64 symbols and in the way after the
others. Prints the attention on the first token and the loss of seven gates,
five seeds of each, which draw the table, the sequences and the parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gated_jax import Decoder
from gated_jax import GateConfig
from gated_jax import ModelConfig
from gated_jax.data.backcopy import BackcopySource
from gated_jax.data.sources import Skipped
from gated_jax.evals import diagnostics

VOCAB, LENGTH, ROWS, STEPS, SEEDS = 65, 48, 8, 1000, 5
GATES = {
  'none': GateConfig(position='none'),
  'elementwise': GateConfig(),
  'headwise': GateConfig(granularity='headwise'),
  'value': GateConfig(position='value'),
  'input-independent': GateConfig(source='parameter', init='zeros'),
  'ns_sigmoid': GateConfig(activation='ns_sigmoid'),
  'exclusive': GateConfig(kind='exclusive'),
}
# The rate stays large: a sink grows as long as it does.
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.adamw(optax.linear_schedule(0, 1e-2, 50), b2=0.95, weight_decay=0.1),
)


def model_of(gate: GateConfig) -> Decoder:
  """One layer, one head."""
  return Decoder(
    ModelConfig(
      vocab=VOCAB,
      length=LENGTH,
      depth=1,
      width=64,
      heads=1,
      kv_heads=1,
      head_dim=64,
      mlp_width=192,
      qk_norm=False,
      dtype='float32',
      scan=False,
      gate=gate,
    )
  )


def batch_of(rows):
  """A batch of sequences, each of one token more than a row."""
  weights = jnp.ones(rows[:, 1:].shape, jnp.float32)
  return {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'weights': weights}


@functools.partial(jax.jit, static_argnums=0)
def train(model, key, rows):
  """Parameters after a step on each batch of rows, and the losses."""
  tokens = jnp.zeros((1, LENGTH), jnp.int32)
  params = nn.unbox(model.init(key, tokens)['params'])

  def step(state, batch):
    params, moments = state

    def loss(params):
      return model.apply(
        {'params': params}, batch_of(batch), method='loss'
      ).total

    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = OPTIMIZER.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  (params, _), losses = jax.lax.scan(
    step, (params, OPTIMIZER.init(params)), rows
  )
  return params, losses


def run(gate: GateConfig, seed: int, steps: int = STEPS) -> tuple[float, float]:
  """Attention on the first token after training, and the loss."""
  model = model_of(gate)
  source = BackcopySource(VOCAB, LENGTH, seed, Skipped())
  random = np.random.default_rng(seed)
  units = -(-ROWS * steps // 256)
  rows = np.concatenate([source.draw(random) for _ in range(units)])
  batches = rows[: ROWS * steps].reshape(steps, ROWS, LENGTH + 1)
  params, losses = train(model, jax.random.key(seed), batches)
  held_out = batch_of(source.draw(random)[:64])
  report = diagnostics.probe(model, params, [held_out])
  return float(report.first_token.mean()), float(losses[-100:].mean())


def main() -> None:
  """Prints a line for each gate: the mean of its seeds, least and most."""
  print(f'{"gate":<18} first-token attention   loss')
  for name, gate in GATES.items():
    sinks, losses = zip(
      *(run(gate, seed) for seed in range(SEEDS)), strict=True
    )
    print(
      f'{name:<18} {np.mean(sinks):.2f} ({min(sinks):.2f} to {max(sinks):.2f})'
      f'      {np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})',
      flush=True,
    )


if __name__ == '__main__':
  main()
