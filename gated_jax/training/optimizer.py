"""Updates of parameters: Optax transformations chosen by their kind.

`RULES` is the whole policy as a table. A parameter says its kind where it is
made (`gated_jax/model/parameters.py`), so that a new layer comes with its rule.
Read `gated_jax/training/step.py` next.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import optax
from optax import contrib

from gated_jax.config import OptimizerConfig
from gated_jax.model.parameters import About
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import about

Tree = Any
Schedule = Callable[[Any], Any]


class Rule(NamedTuple):
  """How one kind of parameter is updated."""

  group: str  # 'matrix', 'vector', 'gate' or 'load'; see `make_optimizer`
  decay: bool  # True: weight decay applies


RULES: dict[Kind, Rule] = {
  Kind.MATRIX: Rule('matrix', decay=True),
  Kind.EMBEDDING: Rule('vector', decay=True),
  Kind.ROUTER: Rule('vector', decay=True),
  Kind.LOAD_BIAS: Rule('load', decay=False),
  Kind.VECTOR: Rule('vector', decay=False),
  Kind.FILTER: Rule('vector', decay=True),
  Kind.BIAS: Rule('vector', decay=False),
  Kind.DECAY: Rule('vector', decay=False),
  Kind.GATE: Rule('gate', decay=True),
  Kind.GATE_SCORES: Rule('gate', decay=False),
  Kind.ADAPTER: Rule('vector', decay=True),
}


def _by_path(facts: dict[tuple[str, ...], About], params: Tree) -> Tree:
  """The facts about every parameter, as a tree like `params`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: facts[tuple(str(part.key) for part in path)], params
  )


def make_schedule(
  config: OptimizerConfig, steps: int, peak: float = 0.0
) -> Schedule:
  """Learning rate by the number of updates made; peak 0: the config's."""
  peak = peak or config.learning_rate
  final = config.final_learning_rate * peak / config.learning_rate
  warmup = config.warmup_steps
  rest = max(1, steps - warmup)
  decay = max(1, round(config.decay_share * rest))
  linear, flat = optax.linear_schedule, optax.constant_schedule(peak)
  shapes = {
    'constant': lambda: [(0, flat)],
    'cosine': lambda: [
      (0, optax.cosine_decay_schedule(peak, rest, final / peak))
    ],
    'wsd': lambda: [(0, flat), (rest - decay, linear(peak, final, decay))],
  }
  pieces = [(warmup + at, piece) for at, piece in shapes[config.schedule]()]
  # The first update already moves: a rate of zero would waste it.
  rise = linear(peak / (warmup + 1), peak, warmup) if warmup else flat
  return optax.join_schedules(
    [rise] + [piece for _, piece in pieces], [at for at, _ in pieces]
  )


def make_optimizer(
  config: OptimizerConfig, steps: int, boxed: Tree
) -> optax.GradientTransformation:
  """Clipping, then one transformation per group of parameters.

  'matrix' is AdamW's or Muon's, 'vector' always AdamW's, 'gate' is AdamW with
  learning rate and weight decay of its own, relative to the rest, and 'load'
  goes against the sign of the gradient by a fixed step (arXiv 2408.15664).

  Args:
    config: of the optimizer.
    steps: of the whole run.
    boxed: parameters in their boxes; they may be abstract.

  Raises:
    ValueError: a parameter does not say its kind.
  """
  facts = about(boxed)
  rate, decay = config.learning_rate, config.weight_decay
  vector = _adamw(config, steps, facts, rate, decay)
  groups = {
    'vector': vector,
    'matrix': OPTIMIZERS[config.name](config, steps, facts),
    'gate': _adamw(
      config,
      steps,
      facts,
      rate * config.gate_learning_rate,
      decay * config.gate_weight_decay,
    ),
    'load': optax.chain(
      optax.scale_by_sign(), optax.scale(-config.router_bias_rate)
    ),
  }
  if Kind.LOAD_BIAS not in {about.kind for about in facts.values()}:
    del groups['load']  # the state of other models stays as it was

  def group(params: Tree) -> Tree:
    """Which optimizer each parameter has, by its kind."""
    tree = _by_path(facts, params)
    return jax.tree.map(lambda x: RULES[x.kind].group, tree)

  update = optax.partition(groups, group)
  if not config.clip_norm:
    return update
  clip: Any = optax.clip_by_global_norm(config.clip_norm)
  if 'load' in groups:  # its gradient is no gradient of the loss
    clip = optax.masked(clip, lambda p: _is_of_loss(_by_path(facts, p)))
  return optax.chain(clip, update)


def _is_of_loss(facts: Tree) -> Tree:
  return jax.tree.map(lambda x: x.kind is not Kind.LOAD_BIAS, facts)


def _adamw(
  config: OptimizerConfig,
  steps: int,
  facts: dict[tuple[str, ...], About],
  rate: float,
  decay: float,
) -> optax.GradientTransformation:
  if not rate:
    return optax.set_to_zero()

  def decays(params: Tree) -> Tree:
    """Which parameters decay, by their kind."""
    tree = _by_path(facts, params)
    return jax.tree.map(lambda x: RULES[x.kind].decay, tree)

  return optax.adamw(
    make_schedule(config, steps, rate),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=decay,
    mask=decays,
  )


def _muon(
  config: OptimizerConfig, steps: int, facts: dict[tuple[str, ...], About]
) -> optax.GradientTransformation:
  def dimensions(params: Tree) -> Tree:
    """Which axes of a matrix Muon takes for its two sides."""
    return jax.tree.map(_muon_dimensions, _by_path(facts, params))

  # Updates as large as AdamW's (arXiv 2502.16982): one learning rate and one
  # weight decay serve both, whatever the shape of the matrix.
  return contrib.muon(
    make_schedule(config, steps),
    beta=config.muon_momentum,
    weight_decay=config.weight_decay,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=dimensions,
  )


def _muon_dimensions(facts: About) -> contrib.MuonDimensionNumbers:
  """Axes that a matrix maps from and to; those before them are a stack."""
  last = -facts.outputs
  return contrib.MuonDimensionNumbers(
    tuple(range(last - facts.inputs, last)), tuple(range(last, 0))
  )


# How matrices are updated, by the name in OptimizerConfig.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'adamw': lambda config, steps, facts: _adamw(
    config, steps, facts, config.learning_rate, config.weight_decay
  ),
  'muon': _muon,
}
