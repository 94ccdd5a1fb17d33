"""GatedAttention in an ordinary linen model, trained by an ordinary loop.

    python docs/examples/linen_model.py

The task: say which token stood at the place that the last token names. It
takes the place of `nn.MultiHeadDotProductAttention`, with the same arguments.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gated_jax import GatedAttention

VOCAB, LENGTH = 8, 8


class Classifier(nn.Module):
  """A learned embedding, one gated attention layer, logits."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(VOCAB, 32)(tokens)
    x += self.param('place', nn.initializers.normal(1.0), (LENGTH, 32))
    h = nn.LayerNorm()(x)
    x += GatedAttention(num_heads=4, gate='headwise')(h)
    x += nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
    return nn.Dense(VOCAB)(x[:, -1])


def batch(key):
  """Random tokens; the last one names the place of the answer."""
  tokens = jax.random.randint(key, (64, LENGTH), 0, VOCAB)
  tokens = tokens.at[:, -1].set(tokens[:, -1] % (LENGTH - 1))
  return tokens, jnp.take_along_axis(tokens, tokens[:, -1:], 1)[:, 0]


def train(steps=400):
  """Losses of the first and the last step."""
  model, optimizer = Classifier(), optax.adam(3e-3)
  params = model.init(jax.random.key(0), batch(jax.random.key(0))[0])
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, key):
    def loss(params):
      tokens, answer = batch(key)
      logits = model.apply(params, tokens)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, answer
      ).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for i in range(steps):
    params, state, value = step(params, state, jax.random.key(i + 1))
    losses.append(float(value))
  return losses[0], losses[-1]


if __name__ == '__main__':
  print('first and last loss: {:.3f}, {:.3f}'.format(*train()))
