"""A run: its length, its updates, its devices, what it keeps."""

import dataclasses
import difflib
from typing import ClassVar

from gated_jax.config.checks import LARGEST
from gated_jax.config.checks import below_one
from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.checks import valid_seed
from gated_jax.config.data import DataConfig
from gated_jax.config.model import ModelConfig
from gated_jax.config.roles import names_with
from gated_jax.config.roles import setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """One update. See gated_jax/training/optimizer.py."""

  ROLE: ClassVar[str] = 'execution'

  name: str = 'adamw'  # 'muon': matrices by Muon, the rest by AdamW
  # 'all', 'adapters' (of model.lora), or patterns over the names of the
  # parameters that train, as '*/gate' or '!embed,!unembed'; see
  # gated_jax/model/patterns.py. The others get no optimizer state and stay as
  # they are.
  train: str = 'all'
  learning_rate: float = 3e-4
  final_learning_rate: float = 3e-5
  schedule: str = 'cosine'  # 'wsd' and 'constant' are the others
  warmup_steps: int = 100
  decay_share: float = 0.2  # share of all steps, at the end of 'wsd'
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # 0: no clipping
  accumulate: int = 1  # gradient accumulation: microbatches per step
  # Multipliers on learning rate and weight decay for gate parameters.
  gate_learning_rate: float = 1.0
  gate_weight_decay: float = 1.0
  muon_momentum: float = 0.95
  # Step of the bias that evens the load of experts (arXiv 2408.15664).
  router_bias_rate: float = 1e-3

  def __post_init__(self) -> None:
    finite('optimizer.', self)
    choice('optimizer.name', self.name, ('adamw', 'muon'))
    choice('optimizer.schedule', self.schedule, ('cosine', 'wsd', 'constant'))
    if not all(word.strip(' !') for word in self.train.split(',')):
      raise ValueError(
        f"optimizer.train={self.train!r} must be 'all' or patterns with commas "
        'between them, none of them empty'
      )
    positive(
      **{
        'optimizer.learning_rate': self.learning_rate,
        'optimizer.accumulate': self.accumulate,
        'optimizer.eps': self.eps,
      }
    )
    not_negative(
      **{
        f'optimizer.{name}': getattr(self, name)
        for name in (
          'final_learning_rate',
          'warmup_steps',
          'weight_decay',
          'clip_norm',
          'gate_learning_rate',
          'gate_weight_decay',
          'router_bias_rate',
        )
      }
    )
    below_one(
      **{
        'optimizer.b1': self.b1,
        'optimizer.b2': self.b2,
        'optimizer.muon_momentum': self.muon_momentum,
      }
    )
    if not 0 < self.decay_share <= 1:
      raise ValueError(
        f'optimizer.decay_share={self.decay_share} must lie in (0, 1]'
      )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each mesh axis has; -1 on one axis: all that are left.

  `slices` counts groups of chips joined by the slow network; they lie on the
  data axis, or on fsdp where `slice_axis` says so.
  """

  ROLE: ClassVar[str] = 'free'

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  slices: int = 1
  slice_axis: str = 'data'  # 'fsdp' is the other

  def __post_init__(self) -> None:
    axes = self.axes
    for name, size in axes.items():
      if size != -1 and size < 1:
        raise ValueError(f'mesh.{name}={size} must be positive, or -1')
    if list(axes.values()).count(-1) > 1:
      raise ValueError(f'only one mesh axis may be -1, not {axes}')
    positive(**{'mesh.slices': self.slices})
    choice('mesh.slice_axis', self.slice_axis, ('data', 'fsdp'))

  @property
  def axes(self) -> dict[str, int]:
    """Axis name to size, outermost first."""
    return {
      name: getattr(self, name)
      for name in ('data', 'fsdp', 'expert', 'context', 'tensor')
    }


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Which checkpoints stay on disk. See gated_jax/training/checkpoints.py."""

  ROLE: ClassVar[str] = 'free'

  every: int = 500  # steps; 0: only the last one
  keep_last: int = 2
  keep_best: int = 1  # best by validation loss
  asynchronous: bool = True
  # Holds what does not train too; otherwise that is left where init_from is.
  whole: bool = False

  def __post_init__(self) -> None:
    not_negative(
      **{
        'checkpoint.every': self.every,
        'checkpoint.keep_best': self.keep_best,
      }
    )
    positive(**{'checkpoint.keep_last': self.keep_last})


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run: what train.py builds from a file in configs/ and flags."""

  ROLE: ClassVar[str] = 'free'

  # Moves the end of the schedule; a resumed run says that it has changed.
  steps: int = 1000
  seed: int = setting(0, 'execution')
  log_every: int = 10
  eval_every: int = 250  # 0: only at the end
  eval_batches: int = 8
  probe_every: int = 250  # attention sinks, gates, activations; 0: at the end
  max_bad_steps: int = 10  # non-finite steps in a row before the run stops
  profile_start: int = 0  # first step of a profiler trace
  profile_steps: int = 0  # 0: no trace
  tensorboard: bool = False
  wandb: str = ''  # project name; '': off
  figures: bool = True
  # A checkpoint folder whose parameters a new run starts from; '': random.
  init_from: str = ''
  # Settings in which this model may compute another function than the one at
  # init_from, as model.rope.base for longer texts. All others have to agree.
  init_changes: tuple[str, ...] = ()
  # A family of Hugging Face files that the model was imported as, and is
  # exported as where it still can be; '': the first that can describe it.
  export_as: str = ''
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()

  def __post_init__(self) -> None:
    known = [f'model.{name}' for name in names_with(self.model, 'model')]
    for name in self.init_changes:
      if not any(f'{other}.'.startswith(f'{name}.') for other in known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise ValueError(
          f'init_changes={list(self.init_changes)}: {name!r} is no setting of '
          f'the model{hint}'
        )
    finite('', self)
    positive(
      steps=self.steps,
      log_every=self.log_every,
      eval_batches=self.eval_batches,
      max_bad_steps=self.max_bad_steps,
    )
    valid_seed(seed=self.seed)
    not_negative(
      eval_every=self.eval_every,
      probe_every=self.probe_every,
      profile_start=self.profile_start,
      profile_steps=self.profile_steps,
    )
    if self.data.length > self.model.length:
      raise ValueError(
        f'data.length={self.data.length} is longer than the '
        f'model.length={self.model.length} that the model is built for'
      )
    if self.optimizer.warmup_steps > self.steps:
      raise ValueError(
        f'optimizer.warmup_steps={self.optimizer.warmup_steps} is more than '
        f'steps={self.steps}'
      )
    if self.data.batch % self.optimizer.accumulate:
      raise ValueError(
        f'data.batch={self.data.batch} must be a multiple of '
        f'optimizer.accumulate={self.optimizer.accumulate}'
      )
    tokens = self.data.batch * self.data.length
    if tokens >= LARGEST:
      raise ValueError(
        f'data.batch={self.data.batch} rows of data.length='
        f'{self.data.length} are {tokens} tokens a step, and must be below '
        '2**31'
      )
    self._refuse_frozen_constants()
    self._check_adapters()

  def _check_adapters(self) -> None:
    """Refuses adapters that nothing trains, or a base that trains with them."""
    rank, train = self.model.lora.rank, self.optimizer.train
    if train == 'adapters' and not rank:
      raise ValueError(
        "optimizer.train='adapters' and model.lora.rank=0, which makes none: a "
        'rank is 1 or more'
      )
    if train == 'all' and rank:
      raise ValueError(
        f"optimizer.train='all' would train the base of model.lora.rank={rank} "
        "too: choose 'adapters' (or '*', if that is meant)"
      )

  def _refuse_frozen_constants(self) -> None:
    """Refuses a gate that starts constant and is never updated."""
    gate = self.model.gate
    constant = gate.init == 'zeros' or not gate.init_std
    if gate.has_scores and constant and not self.optimizer.gate_learning_rate:
      raise ValueError(
        'optimizer.gate_learning_rate=0.0 never updates a gate that starts '
        f'with the same score everywhere (gate.init={gate.init!r}, '
        f'gate.init_std={gate.init_std}): it would stay a constant'
      )
