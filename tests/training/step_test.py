"""One update: accumulation, the guard against non-finite steps, randomness."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gated_jax.config import OptimizerConfig
from gated_jax.training import step as steps

Loss = collections.namedtuple('Loss', 'total nll weight metrics')
P = jax.sharding.PartitionSpec


class Linear:
  """Just enough of a model: weighted squared error of x . w, with noise."""

  def __init__(self, noise=0.0):
    self.noise = noise

  def init(self, key, tokens):
    return {'params': {'w': jax.random.normal(key, (4,))}}

  def apply(self, variables, batch, method, rngs, deterministic):
    assert method == 'loss' and not deterministic
    x = batch['x'] + self.noise * jax.random.normal(rngs['dropout'])
    error = jnp.square(x @ variables['params']['w'] - batch['y'])
    weight = batch['weights'].sum()
    mean = jnp.sum(error * batch['weights']) / jnp.maximum(weight, 1e-9)
    return Loss(2 * mean, mean, weight, {'extra': 3 * mean})


def batch_of(rows=8, seed=0):
  rng = np.random.default_rng(seed)
  # Very uneven weights: counting microbatches alike would show.
  weights = rng.integers(0, 2, (rows, 3)) * 10.0 ** rng.integers(
    0, 3, (rows, 1)
  )
  return {
    'x': rng.normal(size=(rows, 3, 4)).astype(np.float32),
    'y': rng.normal(size=(rows, 3)).astype(np.float32),
    'weights': weights.astype(np.float32),
  }


def make(accumulate=1, noise=0.0, optimizer=None):
  model = Linear(noise)
  optimizer = optimizer or optax.sgd(0.1)
  config = OptimizerConfig(accumulate=accumulate)
  schedule = optax.linear_schedule(0.0, 1.0, 10)
  state = steps.make_init(model, optimizer, 3)(jax.random.key(7))
  return state, jax.jit(steps.make_step(model, optimizer, schedule, config))


def expected_update(state, batch):
  """The same gradient by hand, in float64."""
  x, y, weights = (np.float64(batch[k]) for k in ('x', 'y', 'weights'))
  w = np.float64(state.params['w'])
  error = x @ w - y
  slope = 2 * 2 * np.einsum('bt,btd->d', weights * error, x) / weights.sum()
  return w - 0.1 * slope, np.linalg.norm(slope)


@pytest.mark.parametrize('accumulate', [1, 2, 4, 8])
def test_microbatches_add_up_to_the_whole_batch(accumulate):
  state, step = make(accumulate)
  batch = batch_of()
  new, metrics = step(state, batch)
  w, norm = expected_update(state, batch)
  np.testing.assert_allclose(new.params['w'], w, rtol=1e-5)
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  np.testing.assert_allclose(metrics['extra'], 3 * metrics['loss'], rtol=1e-5)
  np.testing.assert_allclose(metrics['tokens'], batch['weights'].sum())


def test_microbatches_without_weight_change_nothing():
  batch = batch_of()
  batch['weights'][:4] = 0
  one, many = (make(a)[1](make(a)[0], batch) for a in (1, 8))
  np.testing.assert_allclose(one[0].params['w'], many[0].params['w'], rtol=1e-5)


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value):
  state, step = make(optimizer=optax.adam(0.1))
  good, bad = batch_of(), batch_of(seed=1)
  bad['x'][0, 0, 0], bad['weights'][0, 0] = value, 1
  one, _ = step(state, good)
  two, metrics = step(one, bad)
  assert int(two.step) == 2
  assert (int(two.skipped), int(two.bad_in_row)) == (1, 1)
  assert int(metrics['bad_in_row']) == 1
  for kept, old in zip(
    jax.tree.leaves((two.params, two.opt_state)),
    jax.tree.leaves((one.params, one.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(kept, old)
  three, metrics = step(two, bad)
  assert (int(three.skipped), int(three.bad_in_row)) == (2, 2)
  four, metrics = step(three, good)
  assert (int(four.skipped), int(four.bad_in_row)) == (2, 0)
  # One update was made before this one: the schedule did not move on.
  np.testing.assert_allclose(metrics['learning_rate'], 0.1, rtol=1e-6)


def test_a_batch_without_any_target_is_skipped_and_is_not_called_bad():
  # Weight decay would move parameters though every gradient is zero.
  state, step = make(4, optimizer=optax.adamw(0.1, weight_decay=1))
  one, _ = step(state, batch_of())
  empty = batch_of(seed=1)
  empty['weights'][:] = 0
  two, metrics = step(one, empty)
  assert (int(two.step), int(two.skipped), int(two.bad_in_row)) == (2, 1, 0)
  assert np.isfinite([float(x) for x in metrics.values()]).all()
  for kept, old in zip(
    jax.tree.leaves((two.params, two.opt_state)),
    jax.tree.leaves((one.params, one.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(kept, old)


def test_randomness_depends_on_the_step_alone():
  state, step = make(noise=1.0)
  batch = batch_of()
  first, again = step(state, batch)[1]['loss'], step(state, batch)[1]['loss']
  later = step(state.replace(step=state.step + 1), batch)[1]['loss']
  assert first == again
  assert first != later


def test_microbatches_draw_different_noise():
  batch = {k: np.repeat(v[:1], 4, axis=0) for k, v in batch_of().items()}
  batch['weights'] = np.ones_like(batch['weights'])
  state, whole = make(1, noise=1.0)
  _, parts = make(4, noise=1.0)
  assert whole(state, batch)[1]['loss'] != parts(state, batch)[1]['loss']


def test_moments_lie_where_their_parameter_lies():
  mesh = jax.make_mesh((2,), ('fsdp',), devices=jax.devices('cpu')[:2])
  split = jax.sharding.NamedSharding(mesh, P('fsdp'))
  whole = jax.sharding.NamedSharding(mesh, P())
  init = steps.make_init(Linear(), optax.adam(0.1), 3)
  shapes = jax.eval_shape(init, jax.random.key(0))
  found = steps.state_shardings(shapes, {'w': split}, whole)
  assert found.params['w'] == split
  moments = found.opt_state[0]
  assert moments.mu['w'] == moments.nu['w'] == split
  assert moments.count == found.step == found.key == whole
  state = jax.jit(init, out_shardings=found)(jax.random.key(0))
  assert state.opt_state[0].mu['w'].sharding == split
