"""One update: gradients over microbatches, clipping, and a guard.

A step whose loss or gradient is not finite leaves parameters and optimizer
as they were and is counted. So does one whose batch has no target: weight
decay and momentum alone are no update that anybody asked for. Randomness is
`fold_in(key, step)`, so a run that resumes at a step draws what it would have
drawn. Read `gated_jax/training/loop.py` next.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import meta
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import stacks
from gated_jax.config import OptimizerConfig
from gated_jax.training.optimizer import Schedule
from gated_jax.training.parts import Part

Tree = Any
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
# (model, params, batch, key) -> the fields of `gated_jax.model.decoder.Loss`:
# `total` is minimised, means go over tokens by `weight`, and so add up.
LossFunction = Callable[[Any, Tree, Batch, jax.Array], Any]


@struct.dataclass
class TrainState:
  """All that the next step depends on, apart from the data.

  `step` counts batches seen; `skipped` those that changed nothing because
  they were not finite or had no target; `bad_in_row` those that were not
  finite, since the last that was. Fields are arrays, or in their place shapes
  or shardings: so no types stand here.
  """

  step: Any  # int32 []
  params: Tree
  opt_state: Tree
  key: Any  # uint32 [2], the data of a PRNG key
  skipped: Any  # int32 []
  bad_in_row: Any  # int32 []


def make_init(
  model: Any,
  optimizer: optax.GradientTransformation,
  length: int,
  part: Part = Part(),
) -> Callable[[jax.Array], TrainState]:
  """A function from a key to the state before the first step.

  Args:
    model: has the method `init`.
    optimizer: its state is made for the part that trains.
    length: of the row that is traced.
    part: the parameters that train.
  """

  def init(key: jax.Array) -> TrainState:
    """Parameters, optimizer state and keys of step 0."""
    init_key, run_key = jax.random.split(key)
    params = meta.unbox(
      model.init(init_key, jnp.zeros((1, length), jnp.int32))['params']
    )
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
      step=zero,
      params=params,
      opt_state=optimizer.init(part.of(params)),
      key=jax.random.key_data(run_key),
      skipped=zero,
      bad_in_row=zero,
    )

  return init


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  keys = (p for p in path if isinstance(p, jax.tree_util.DictKey))
  return tuple(str(p.key) for p in keys)


def state_shardings(
  state: TrainState, params: Tree, other: jax.sharding.Sharding
) -> TrainState:
  """Shardings of a whole state: moments lie where their parameter lies.

  Args:
    state: Abstract arrays.
    params: The sharding of each parameter.
    other: The sharding of what belongs to no parameter.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  by_name = {_names(path): sharding for path, sharding in leaves}
  shapes = {
    _names(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
  }

  def of(path, leaf):
    """The sharding of the parameter whose name ends this path."""
    names = _names(path)
    for start in range(len(names)):
      name = names[start:]
      if name in by_name and shapes[name] == leaf.shape:
        return by_name[name]
    return other

  return jax.tree_util.tree_map_with_path(of, state)


def _microbatches(batch: Batch, count: int) -> dict[str, Any]:
  """[B, T] as [count, B / count, T]; a device's rows stay on that device."""

  def split(x):
    """One array, cut so that each part takes rows of every device."""
    rows = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  return {name: split(x) for name, x in batch.items()}


def _gradients(
  loss: Callable[..., Any],
  params: Tree,
  batch: Batch,
  key: jax.Array,
  accumulate: int,
) -> tuple[Tree, Metrics]:
  """Gradient and metrics of the mean over every token of the batch.

  Microbatches count by their weights: one with more padding counts less, so
  that the sum equals the gradient of the whole batch.
  """

  def evaluate(params, part, key):
    """The loss to differentiate, with what is reported beside it."""
    value = loss(params, part, key)
    metrics = {'loss': value.nll, 'total_loss': value.total, **value.metrics}
    return value.total, (value.weight, metrics)

  gradient = stacks.in_place(jax.grad(evaluate, has_aux=True))
  if accumulate == 1:
    grads, (weight, metrics) = gradient(params, batch, key)
    return grads, {**metrics, 'tokens': weight}

  def part(carry, x):
    """Adds one part's gradient, weighted by its targets."""
    index, rows = x
    grads, (weight, metrics) = gradient(
      params, rows, jax.random.fold_in(key, index)
    )
    new = jax.tree.map(
      lambda a: a.astype(jnp.float32) * weight, (grads, metrics)
    )
    return jax.tree.map(jnp.add, carry, (*new, weight)), None

  rows = _microbatches(batch, accumulate)
  first = jax.tree.map(lambda x: x[0], rows)
  shapes = jax.eval_shape(gradient, params, first, key)
  grads, (weight, metrics) = shapes
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), (grads, metrics, weight)
  )
  (grads, metrics, weight), _ = jax.lax.scan(
    part, zeros, (jnp.arange(accumulate), rows)
  )
  grads, metrics = jax.tree.map(
    lambda a: a / jnp.maximum(weight, 1e-9), (grads, metrics)
  )
  return grads, {**metrics, 'tokens': weight}


def model_loss(model: Any, params: Tree, batch: Batch, key: jax.Array) -> Any:
  """The model's own loss: the cross-entropy of the targets.

  Args:
    model: has the method `loss`.
    params: all of its parameters.
    batch: the arrays of `gated_jax/data/batch.py`.
    key: for dropout.
  """
  return model.apply(
    {'params': params},
    batch,
    method='loss',
    rngs={'dropout': key},
    deterministic=False,
  )


def _of_part(
  own: LossFunction, model: Any, part: Part, params: Tree
) -> Callable[..., Any]:
  """A loss of the parameters that train alone."""

  def loss(trained, batch, key):
    """The loss of one part of a batch."""
    return own(model, part.put(trained, params), batch, key)

  return loss


def make_step(
  model: Any,
  optimizer: optax.GradientTransformation,
  schedule: Schedule | None,
  config: OptimizerConfig,
  part: Part = Part(),
  own_loss: LossFunction = model_loss,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure function (state, batch) -> (state, metrics); see the file.

  Args:
    model: has the method `loss`.
    optimizer: its updates are added to the parameters.
    schedule: the learning rate that is reported; None: it is not known.
    config: says how many parts a batch is worked through in.
    part: the parameters that train; no gradient is computed for the others.
    own_loss: in place of the model's.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step; without a finite update it changes no parameter."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss = _of_part(own_loss, model, part, state.params)
    old = part.of(state.params)
    gradient, metrics = _gradients(loss, old, batch, key, config.accumulate)
    norm: Float[Array, ''] = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics['total_loss']) & jnp.isfinite(norm)
    good = finite & (metrics['tokens'] > 0)
    updates, opt_state = optimizer.update(gradient, state.opt_state, old)
    trained = optax.apply_updates(old, updates)

    def keep(new, old):
      """The new values if the step counts, else the old."""
      return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    bad = 1 - finite.astype(jnp.int32)
    new = TrainState(
      step=state.step + 1,
      params=part.put(keep(trained, old), state.params),
      opt_state=keep(opt_state, state.opt_state),
      key=state.key,
      skipped=state.skipped + 1 - good.astype(jnp.int32),
      bad_in_row=(state.bad_in_row + 1) * bad,
    )
    metrics |= {
      'grad_norm': norm,
      'skipped': new.skipped,
      'bad_in_row': new.bad_in_row,
    }
    if schedule is not None:
      # The schedule counts updates, and a skipped step is none.
      rate = schedule(state.step - state.skipped)
      metrics['learning_rate'] = jnp.asarray(rate)
    return new, metrics

  return step
