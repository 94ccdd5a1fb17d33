"""A small NNX language model with gated attention: trains, then samples.

    python docs/examples/nnx_transformer.py

It learns to count: a row goes up by a step that its first two tokens show.
`gated_jax.nnx.GatedAttention` stands where `nnx.MultiHeadAttention` stood.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gated_jax.nnx import GatedAttention

VOCAB, LENGTH, WIDTH, DEPTH = 11, 12, 32, 2


class Block(nnx.Module):
  """Attention and an MLP, each normed and added."""

  def __init__(self, rngs):
    self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
    self.attention = GatedAttention(
      num_heads=4, in_features=WIDTH, causal=True, gate='headwise', rngs=rngs
    )
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x, decode=False):
    x += self.attention(self.norms[0](x), decode=decode)
    return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
  """Embeddings of tokens and places, blocks, logits."""

  def __init__(self, rngs):
    self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
    self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
    self.logits = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

  def __call__(self, tokens, start=0, decode=False):
    x = self.tokens(tokens) + self.places(start + jnp.arange(tokens.shape[1]))
    for block in self.blocks:
      x = block(x, decode)
    return self.logits(x)


def rows(key):
  """Rows that go up by one step each, modulo the vocabulary."""
  first, step = jax.random.randint(key, (2, 64, 1), 0, VOCAB)
  return (first + step * jnp.arange(LENGTH)) % VOCAB


@nnx.jit
def train_step(model, optimizer, key):
  """One update; the loss before it."""

  def loss(model):
    tokens = rows(key)
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits[:, 1:], tokens[:, 2:]
    )
    return losses.mean()

  value, gradient = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradient)
  return value


def train(steps=150):
  """The trained model; losses of the first and the last step."""
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
  keys = jax.random.split(jax.random.key(1), steps)
  losses = [float(train_step(model, optimizer, key)) for key in keys]
  return model, losses[0], losses[-1]


def sample(model, prompt):
  """Rows that go on from a prompt, one token at a time through the caches."""
  for block in model.blocks:
    block.attention.init_cache((len(prompt), LENGTH, WIDTH))

  @nnx.jit
  def step(model, token, place):
    logits = model(token, start=place, decode=True)
    return jnp.argmax(logits, axis=-1)

  written = [prompt[:, i : i + 1] for i in range(prompt.shape[1])]
  for place in range(LENGTH - 1):
    following = step(model, written[place], place)
    if place + 1 == len(written):
      written.append(following)
  return jnp.concatenate(written, axis=1)


if __name__ == '__main__':
  trained, first_loss, last_loss = train()
  print(f'first and last loss: {first_loss:.3f}, {last_loss:.3f}')
  print(sample(trained, jnp.array([[0, 1], [5, 8]])))
