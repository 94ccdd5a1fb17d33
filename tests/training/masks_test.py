"""What the loss leaves out teaches nothing, however a batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from gated_jax import sharding
from gated_jax.config import DataConfig
from gated_jax.config import LoraConfig
from gated_jax.config import MeshConfig
from gated_jax.config import ModelConfig
from gated_jax.config import OptimizerConfig
from gated_jax.config import RunConfig
from gated_jax.model import adapters
from gated_jax.model.decoder import Decoder
from gated_jax.training.build import make_functions

MODEL = ModelConfig(
  vocab=64, depth=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=16,
  length=16, dtype='float32', tie_embeddings=False,
  lora=LoraConfig(rank=2, alpha=8.0),
)  # fmt: skip
ROWS, LENGTH = 8, 16


def batch_of(seed=0):
  """Two documents a row, and from none to all of a row's targets count."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, 60, (ROWS, LENGTH + 1)).astype(np.int32)
  second = np.arange(LENGTH) >= 9
  weights = np.arange(LENGTH) < np.array(
    [[0], [1], [2], [3], [8], [0], [16], [5]]
  )
  return {
    'tokens': ids[:, :-1],
    'targets': ids[:, 1:],
    'segments': np.tile(1 + second, (ROWS, 1)).astype(np.int32),
    'positions': np.tile(np.arange(LENGTH) - 9 * second, (ROWS, 1)).astype(
      np.int32
    ),
    'weights': weights.astype(np.float32),
  }


def drawn(seed=0):
  """Parameters in which no adapter is zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(
    Decoder(MODEL).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32),
    meta.unbox(shapes['params']),
  )


@jax.jit
def gradient(params, batch):
  def total(params):
    loss = Decoder(MODEL).apply(
      {'params': params}, batch, method='loss', deterministic=True
    )
    return loss.total

  return jax.value_and_grad(total)(params)


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.long
def test_tokens_that_do_not_count_have_gradients_of_exactly_zero():
  params, batch = drawn(), batch_of()
  batch['weights'][:, 9:] = 0  # of every second document
  expected = gradient(params, batch)
  assert all(np.any(x) for x in jax.tree.leaves(expected[1]))
  # Other targets where none counts: the same loss and gradients, to the bit.
  hidden = batch['weights'] == 0
  targets = np.where(hidden, (batch['targets'] + 7) % 60, batch['targets'])
  same(gradient(params, {**batch, 'targets': targets}), expected)
  # Documents of which nothing counts move no embedding of theirs.
  tokens = np.where(np.arange(LENGTH) >= 9, 60 + batch['tokens'] % 4, 0)
  batch['tokens'] = np.where(tokens, tokens, batch['tokens']).astype(np.int32)
  _, slope = gradient(params, batch)
  rows = np.asarray(slope['embed']['embedding'])
  assert not np.any(rows[60:]) and np.any(rows[:60])
  batch['weights'][:] = 0
  loss, slope = gradient(params, batch)
  assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves(slope))


def step_once(mesh, accumulate=1, batches=(0,), **changes):
  """Adapters and metrics after a step for each of some batches."""
  config = RunConfig(
    steps=4,
    model=MODEL,
    data=DataConfig(source='synthetic', batch=ROWS, length=LENGTH),
    optimizer=OptimizerConfig(
      warmup_steps=0, train='adapters', schedule='constant', learning_rate=0.01,
      accumulate=accumulate, clip_norm=0.0,
    ),
    mesh=mesh,
  )  # fmt: skip
  count = mesh.fsdp * mesh.tensor * mesh.context
  devices = sharding.make_mesh(mesh, jax.devices()[:count])
  with sharding.activate(devices):
    abstract, init, step = make_functions(config, Decoder(MODEL), devices)
    state = init(jax.random.key(0))
    placed = jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      drawn(),
      abstract.params,
    )
    state = state.replace(params=placed)
    for seed in batches:
      batch = {**batch_of(seed), **changes}
      rows = sharding.batch_sharding(devices)
      state, metrics = step(state, jax.device_put(batch, rows))
  return jax.device_get((adapters.alone(state.params), metrics))


@pytest.fixture(scope='module')
def alone():
  return step_once(MeshConfig(fsdp=1), batches=(0, 1))


def close(found, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5),
    found[0],
    expected[0],
  )
  for name in ('loss', 'tokens', 'grad_norm'):
    np.testing.assert_allclose(found[1][name], expected[1][name], rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
  'accumulate', [pytest.param(2, marks=pytest.mark.nightly), 8]
)
def test_parts_of_unequal_targets_add_up_to_the_whole_batch(alone, accumulate):
  close(step_once(MeshConfig(fsdp=1), accumulate, batches=(0, 1)), alone)


@pytest.mark.nightly
@pytest.mark.parametrize(
  'mesh',
  [
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(fsdp=2, tensor=2, context=2),
  ],
  ids=['fsdp', 'tensor', 'context'],
)
def test_masks_and_adapters_give_the_same_on_eight_devices(alone, mesh):
  close(step_once(mesh, batches=(0, 1)), alone)


@pytest.mark.long
def test_a_batch_without_targets_leaves_adapters_as_they_are():
  nothing = np.zeros((ROWS, LENGTH), np.float32)
  found, metrics = step_once(MeshConfig(fsdp=1), 2, weights=nothing)
  same(found, adapters.alone(drawn()))
  assert metrics['skipped'] == 1 and metrics['bad_in_row'] == 0
  assert metrics['loss'] == 0 and np.isfinite(metrics['grad_norm'])
