"""What updates which parameter: Optax transformations chosen by exact path.

`RULES` is the whole policy as a table. Every parameter must be covered by
exactly one row; one covered by none or by two is an error that names it, so
that a new layer cannot be trained by accident under a rule nobody chose.
Read `gated_jax/training/step.py` next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from gated_jax.config import OptimizerConfig

Tree = Any
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of parameter is updated.

  Attributes:
    suffix: The last components of the path, compared whole: 'gate/kernel'
      is not 'gate_proj/kernel'. In 'a|b', either component will do.
    group: 'matrix', 'vector' or 'gate'; see `make_optimizer`.
    decay: Whether weight decay applies.
    inputs, outputs: Axes, from the end, that a matrix maps from and to.
      What is left (layers, experts) is a stack of independent matrices.
  """

  suffix: str
  group: str
  decay: bool
  inputs: tuple[int, ...] = ()
  outputs: tuple[int, ...] = ()

  def covers(self, path: tuple[str, ...]) -> bool:
    parts = self.suffix.split('/')
    tail = path[-len(parts) :]
    return len(tail) == len(parts) and all(
      name in part.split('|') for name, part in zip(tail, parts, strict=True)
    )


RULES = (
  Rule('embed/embedding', 'vector', decay=True),
  Rule('unembed/kernel', 'vector', decay=True),
  Rule('final_norm/scale', 'vector', decay=False),
  Rule(
    'attention_norm|mlp_norm|attention_post_norm|mlp_post_norm/scale',
    'vector',
    decay=False,
  ),
  Rule(
    'attention/query_norm|key_norm|output_norm/scale', 'vector', decay=False
  ),
  Rule(
    'attention/query|key|value/kernel',
    'matrix',
    decay=True,
    inputs=(-3,),
    outputs=(-2, -1),
  ),
  Rule(
    'attention/out/kernel',
    'matrix',
    decay=True,
    inputs=(-3, -2),
    outputs=(-1,),
  ),
  Rule('attention/gate/kernel', 'gate', decay=True),
  Rule('attention/gate/scores', 'gate', decay=False),
  Rule(
    'mlp/gate_proj|up|down/kernel',
    'matrix',
    decay=True,
    inputs=(-2,),
    outputs=(-1,),
  ),
  Rule('moe/router/kernel', 'vector', decay=True),
  Rule(
    'moe/gate_proj|up|down',
    'matrix',
    decay=True,
    inputs=(-2,),
    outputs=(-1,),
  ),
  Rule(
    'moe/shared/gate_proj|up|down/kernel',
    'matrix',
    decay=True,
    inputs=(-2,),
    outputs=(-1,),
  ),
)


def rule_for(path: tuple[str, ...]) -> Rule:
  """The one row of `RULES` that covers a parameter's path."""
  found = [rule for rule in RULES if rule.covers(path)]
  name = '/'.join(path)
  if not found:
    raise ValueError(
      f'no optimizer rule covers the parameter {name}: add one to RULES in '
      'gated_jax/training/optimizer.py'
    )
  if len(found) > 1:
    both = ' and '.join(repr(rule.suffix) for rule in found)
    raise ValueError(f'the parameter {name} is covered by {both}')
  return found[0]


def rules_of(params: Tree) -> Tree:
  """The rule of every parameter, as a tree of the same structure."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule_for(tuple(str(part.key) for part in path)), params
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
  config: OptimizerConfig, steps: int, params: Tree
) -> optax.GradientTransformation:
  """Clipping, then one transformation per group of parameters.

  `params` may be abstract: only its paths are read. 'matrix' is AdamW's or
  Muon's, 'vector' always AdamW's, and 'gate' is AdamW with learning rate and
  weight decay of its own, relative to the rest.
  """
  rules = rules_of(params)
  rate, decay = config.learning_rate, config.weight_decay
  vector = _adamw(config, steps, rate, decay)
  groups = {
    'vector': vector,
    'matrix': _muon(config, steps) if config.name == 'muon' else vector,
    'gate': _adamw(
      config,
      steps,
      rate * config.gate_learning_rate,
      decay * config.gate_weight_decay,
    ),
  }
  update = optax.partition(groups, jax.tree.map(lambda r: r.group, rules))
  if not config.clip_norm:
    return update
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _adamw(
  config: OptimizerConfig, steps: int, rate: float, decay: float
) -> optax.GradientTransformation:
  if not rate:
    return optax.set_to_zero()
  return optax.adamw(
    make_schedule(config, steps, rate),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=decay,
    mask=lambda params: jax.tree.map(lambda r: r.decay, rules_of(params)),
  )


def _muon(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  def dimensions(params: Tree) -> Tree:
    return jax.tree.map(
      lambda rule: contrib.MuonDimensionNumbers(rule.inputs, rule.outputs),
      rules_of(params),
    )

  # Updates as large as AdamW's (arXiv 2502.16982): one learning rate and one
  # weight decay serve both, whatever the shape of the matrix.
  return contrib.muon(
    make_schedule(config, steps),
    beta=config.muon_momentum,
    weight_decay=config.weight_decay,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=dimensions,
  )
