"""Every setting of a run: frozen dataclasses, their defaults, their checks.

One default stands in one place, and that place is here. Nothing in this file
touches JAX or a file, so it imports in a moment and can be tested alone.
`GateConfig` comes first because it is what the project is about; read
`gated_jax/ops/gate.py` next for its mathematics.

Lengths are in tokens, rates per optimizer step, sizes in elements unless a
comment says otherwise. A value of 0, '' or 'none' means "off" or "derive it".
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

# Where a gate can act. In the paper's numbering sdpa_output is G1, value G2,
# key G3, query G4 and dense_output G5 (arXiv 2505.06708, section 2.2).
POSITIONS = ('none', 'query', 'key', 'value', 'sdpa_output', 'dense_output')
ACTIVATIONS = (
  'sigmoid',
  'silu',
  'identity',
  'ns_sigmoid',
  'two_sigmoid',
  'softplus',
)

# What a run can read; see gated_jax/data/sources.py.
SOURCES = (
  'stdlib',
  'text',
  'jsonl',
  'parquet',
  'array_record',
  'tokens',
  'synthetic',
)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(allowed)}')


def _positive(**values: int | float) -> None:
  for name, value in values.items():
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'{name}={value} must be positive')
    if isinstance(value, int) and value >= 2**31:  # devices count in int32
      raise ValueError(f'{name}={value} must be below 2**31')


def _not_negative(**values: int | float) -> None:
  for name, value in values.items():
    if not (math.isfinite(value) and value >= 0):
      raise ValueError(f'{name}={value} must not be negative')


def _seed(**values: int) -> None:
  for name, value in values.items():
    if not 0 <= value < 2**31:
      raise ValueError(f'{name}={value} must lie in [0, 2**31)')


def _below_one(**values: int | float) -> None:
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name}={value} must lie in [0, 1)')


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """What gates a softmax attention layer, and where.

  The default is the paper's best: Y' = Y * sigmoid(X W) on the attention
  output, one score per head and channel. `configs/gate_sweep.py` spells every
  row of the paper's tables in these words.
  """

  position: str = 'sdpa_output'
  # 'gate': scores from `source`. 'rms_norm', 'silu': no scores at all, that
  # function of each head's attention output instead (Table 3, rows 5 and 6).
  kind: str = 'gate'
  granularity: str = 'elementwise'  # or 'headwise': one score per head
  shared: bool = False  # scores averaged over the heads (Table 1, row 12)
  mode: str = 'multiplicative'  # or 'additive'
  activation: str = 'sigmoid'
  source: str = 'hidden'  # or 'parameter': the same scores for every token
  channels: int = 0  # the scores read only these first channels; 0: all
  init: str = 'normal'  # or 'zeros'
  init_std: float = 0.02
  dtype: str = 'float32'  # or 'model': rounded as the rest of the layer

  def __post_init__(self):
    _choice('gate.position', self.position, POSITIONS)
    _choice('gate.kind', self.kind, ('gate', 'rms_norm', 'silu'))
    _choice('gate.granularity', self.granularity, ('elementwise', 'headwise'))
    _choice('gate.mode', self.mode, ('multiplicative', 'additive'))
    _choice('gate.activation', self.activation, ACTIVATIONS)
    _choice('gate.source', self.source, ('hidden', 'parameter'))
    _choice('gate.init', self.init, ('normal', 'zeros'))
    _choice('gate.dtype', self.dtype, ('float32', 'model'))
    _not_negative(
      **{'gate.channels': self.channels, 'gate.init_std': self.init_std}
    )
    self._refuse_nonsense()

  def _refuse_nonsense(self):
    """Refuses what has no meaning, with the reason."""
    if self.kind != 'gate':
      if self.position != 'sdpa_output':
        raise ValueError(
          f'gate.kind={self.kind!r} stands in place of a gate on the '
          f'attention output: position={self.position!r} must be sdpa_output'
        )
      plain = GateConfig(dtype=self.dtype)
      changed = [
        f.name
        for f in dataclasses.fields(self)
        if f.name != 'kind' and getattr(self, f.name) != getattr(plain, f.name)
      ]
      if changed:
        raise ValueError(
          f'gate.kind={self.kind!r} has no scores, so '
          f'{", ".join(changed)} would change nothing'
        )
    if self.position == 'dense_output':
      if self.granularity == 'headwise':
        raise ValueError(
          "gate.granularity='headwise' has no heads to act on at "
          "position='dense_output', which comes after they are joined"
        )
      if self.shared:
        raise ValueError(
          'gate.shared=True averages over heads, and there are none at '
          "position='dense_output'"
        )
    if self.shared and self.granularity == 'headwise':
      raise ValueError(
        'gate.shared=True keeps one score per channel and headwise one per '
        'head: together they leave one per token, which is neither'
      )
    if self.source == 'parameter' and self.channels:
      raise ValueError(
        f"gate.channels={self.channels} chooses inputs, and source='parameter'"
        ' has none'
      )

  @property
  def has_scores(self) -> bool:
    """Whether the layer owns gate parameters and computes scores."""
    return self.position != 'none' and self.kind == 'gate'


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding. Names and formulas as Hugging Face has them."""

  base: float = 10_000.0
  fraction: float = 1.0  # of head_dim that turns (partial rotary)
  scaling: str = 'none'  # or 'linear', 'yarn'
  factor: float = 1.0  # new length over original_length
  original_length: int = 0  # what the weights were trained with (yarn)
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0  # 0: from factor, as the YaRN paper does
  mscale: float = 0.0
  mscale_all_dim: float = 0.0
  truncate: bool = True  # round the correction range to whole channels

  def __post_init__(self):
    _choice('rope.scaling', self.scaling, ('none', 'linear', 'yarn'))
    _positive(**{'rope.base': self.base, 'rope.fraction': self.fraction})
    if self.fraction > 1:
      raise ValueError(f'rope.fraction={self.fraction} must be at most 1')
    if self.factor < 1:
      raise ValueError(f'rope.factor={self.factor} must be at least 1')
    if self.scaling == 'none' and self.factor != 1:
      raise ValueError(
        f"rope.factor={self.factor} does nothing with rope.scaling='none'"
      )
    if self.scaling == 'yarn' and self.original_length <= 0:
      raise ValueError(
        "rope.scaling='yarn' needs rope.original_length, the length the "
        f'weights were trained with, not {self.original_length}'
      )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Experts in place of the MLP; experts=0 keeps the MLP."""

  experts: int = 0
  top_k: int = 8
  width: int = 768  # of one expert
  shared_width: int = 0  # of an expert that every token takes; 0: none
  normalize: bool = True  # the chosen weights sum to one
  balance_loss: float = 1e-2  # ours: the paper does not print it
  router_z_loss: float = 1e-3  # ours as well
  implementation: str = 'auto'  # grouped matmul: 'ragged_dot', 'gmm'

  def __post_init__(self):
    _not_negative(
      **{
        'moe.experts': self.experts,
        'moe.shared_width': self.shared_width,
        'moe.balance_loss': self.balance_loss,
        'moe.router_z_loss': self.router_z_loss,
      }
    )
    _positive(**{'moe.top_k': self.top_k, 'moe.width': self.width})
    _choice(
      'moe.implementation', self.implementation, ('auto', 'ragged_dot', 'gmm')
    )
    if self.experts and self.top_k > self.experts:
      raise ValueError(
        f'moe.top_k={self.top_k} experts cannot be chosen from '
        f'moe.experts={self.experts}'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. The default is the paper's 1.7B model with 28 layers."""

  vocab: int = 151_936
  length: int = 4096  # the longest sequence it is built for
  depth: int = 28
  width: int = 2048
  heads: int = 16
  kv_heads: int = 8
  head_dim: int = 128
  mlp_width: int = 6144
  tie_embeddings: bool = True
  norm: str = 'pre'  # or 'sandwich': also on what a block adds
  norm_eps: float = 1e-6
  norm_zero_centered: bool = False  # scale stored as its distance from one
  qk_norm: bool = True
  # One entry per layer of a pattern that repeats over the depth: how many
  # tokens back a query sees, itself included; 0: all.
  windows: tuple[int, ...] = (0,)
  global_rope: bool = True  # False: layers with window 0 have no positions
  dropout: float = 0.0  # on attention weights and on what a block adds
  dtype: str = 'bfloat16'  # of activations
  param_dtype: str = 'float32'
  init_std: float = 0.02
  attention: str = 'auto'  # backend: xla, cudnn, splash, pallas_tpu
  scan: bool = True  # compile one layer and loop over it
  remat: str = 'none'  # what backward recomputes: see model/decoder.py
  logit_chunk: int = 0  # tokens per chunk of the loss; 0: chosen by vocabulary
  z_loss: float = 0.0
  gate: GateConfig = GateConfig()
  rope: RopeConfig = RopeConfig()
  moe: MoEConfig = MoEConfig()

  def __post_init__(self):
    _positive(
      **{
        f'model.{name}': getattr(self, name)
        for name in (
          'vocab',
          'length',
          'depth',
          'width',
          'heads',
          'kv_heads',
          'head_dim',
          'mlp_width',
          'norm_eps',
          'init_std',
        )
      }
    )
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.heads={self.heads} must be a multiple of '
        f'model.kv_heads={self.kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim={self.head_dim} must be even')
    if int(self.head_dim * self.rope.fraction) % 2:
      raise ValueError(
        f'rope.fraction={self.rope.fraction} of model.head_dim='
        f'{self.head_dim} must be an even number of channels'
      )
    if not self.windows or self.depth % len(self.windows):
      raise ValueError(
        f'model.depth={self.depth} must be a multiple of the '
        f'{len(self.windows)} entries of model.windows={self.windows}'
      )
    for window in self.windows:
      _not_negative(**{'model.windows': window})
    if self.gate.channels > self.width:
      raise ValueError(
        f'gate.channels={self.gate.channels} must be at most '
        f'model.width={self.width}'
      )
    if (
      self.qk_norm
      and self.gate.has_scores
      and self.gate.granularity == 'headwise'
      and self.gate.mode == 'multiplicative'
      and self.gate.position in ('query', 'key')
    ):
      raise ValueError(
        f"gate.granularity='headwise' at position={self.gate.position!r} "
        'scales whole heads, and model.qk_norm=True takes their scale away'
      )
    _choice('model.norm', self.norm, ('pre', 'sandwich'))
    _choice('model.dtype', self.dtype, ('bfloat16', 'float16', 'float32'))
    _choice('model.param_dtype', self.param_dtype, ('float32', 'bfloat16'))
    _choice(
      'model.attention',
      self.attention,
      ('auto', 'xla', 'cudnn', 'splash', 'pallas_tpu'),
    )
    _choice('model.remat', self.remat, ('none', 'full', 'attention', 'minimal'))
    _below_one(**{'model.dropout': self.dropout})
    _not_negative(
      **{'model.z_loss': self.z_loss, 'model.logit_chunk': self.logit_chunk}
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to rows of tokens. See gated_jax/data/pipeline.py."""

  # 'stdlib': the running interpreter's own standard library. 'synthetic':
  # random spans that repeat. 'mixture': `mixture` below. The rest read `paths`.
  source: str = 'stdlib'
  paths: str = ''  # globs, comma-separated; ** is folders at any depth
  column: str = 'text'  # field of JSONL, Parquet and ArrayRecord examples
  # For source='mixture': entries 'weight:source:paths', weighted by tokens.
  mixture: tuple[str, ...] = ()
  tokenizer: str = 'bytes'  # or a path: tokenizer.json, *.model
  batch: int = 8  # rows per step, over all processes
  length: int = 256  # tokens per row
  validation: float = 0.05  # share of documents held out, by their content
  max_document: int = 1 << 20  # bytes of text, or ids; longer ones are cut
  shuffle: bool = True
  # Tokens whose rows are shuffled among each other, beside the order of files.
  # Resuming packs that many again, and memory holds them twice, 20 bytes each.
  shuffle_tokens: int = 1 << 20
  seed: int = 0
  prefetch: int = 4  # batches made ahead of the step

  def __post_init__(self):
    _choice('data.source', self.source, (*SOURCES, 'mixture'))
    _positive(
      **{
        f'data.{name}': getattr(self, name)
        for name in (
          'batch',
          'length',
          'max_document',
          'shuffle_tokens',
          'prefetch',
        )
      }
    )
    _below_one(**{'data.validation': self.validation})
    _seed(**{'data.seed': self.seed})
    if not self.tokenizer:
      raise ValueError("data.tokenizer='' must be 'bytes' or a path")
    if self.source == 'mixture':
      if not self.mixture:
        raise ValueError("data.source='mixture' needs data.mixture")
    elif self.mixture:
      raise ValueError(
        f'data.mixture={self.mixture} does nothing with '
        f'data.source={self.source!r}'
      )
    needs_paths = self.source not in ('stdlib', 'synthetic', 'mixture')
    if needs_paths and not self.paths.strip(' ,'):
      raise ValueError(f'data.source={self.source!r} needs data.paths')
    if self.paths and not needs_paths:
      raise ValueError(
        f'data.paths={self.paths!r} does nothing with '
        f'data.source={self.source!r}'
      )
    self.parts()

  def parts(self) -> tuple[tuple[float, 'DataConfig'], ...]:
    """Weight and settings of each source of the mixture, or of the only one."""
    if self.source != 'mixture':
      return ((1.0, self),)
    parts = []
    for entry in self.mixture:
      words = entry.split(':', 2) if isinstance(entry, str) else [entry]
      try:
        weight = float(words[0])
      except (TypeError, ValueError):
        weight = math.nan
      if len(words) < 2 or not (math.isfinite(weight) and weight > 0):
        raise ValueError(
          f"data.mixture entry {entry!r} must be 'weight:source:paths' with a "
          'positive weight'
        )
      _choice(f'source of data.mixture entry {entry!r}', words[1], SOURCES)
      part = dataclasses.replace(
        self,
        source=words[1],
        paths=words[2] if len(words) == 3 else '',
        mixture=(),
      )
      parts.append((weight, part))
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """One update. See gated_jax/training/optimizer.py."""

  name: str = 'adamw'  # or 'muon': matrices by Muon, the rest by AdamW
  learning_rate: float = 3e-4
  final_learning_rate: float = 3e-5
  schedule: str = 'cosine'  # or 'wsd', 'constant'
  warmup_steps: int = 100
  decay_share: float = 0.2  # of all steps, at the end of 'wsd'
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # 0: no clipping
  accumulate: int = 1  # parts that a batch is worked through in, one by one
  # The gates are a group of their own: both are relative to the rest.
  gate_learning_rate: float = 1.0
  gate_weight_decay: float = 1.0
  muon_momentum: float = 0.95

  def __post_init__(self):
    _choice('optimizer.name', self.name, ('adamw', 'muon'))
    _choice('optimizer.schedule', self.schedule, ('cosine', 'wsd', 'constant'))
    _positive(
      **{
        'optimizer.learning_rate': self.learning_rate,
        'optimizer.accumulate': self.accumulate,
        'optimizer.eps': self.eps,
      }
    )
    _not_negative(
      **{
        f'optimizer.{name}': getattr(self, name)
        for name in (
          'final_learning_rate',
          'warmup_steps',
          'weight_decay',
          'clip_norm',
          'gate_learning_rate',
          'gate_weight_decay',
        )
      }
    )
    _below_one(
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

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  slices: int = 1
  slice_axis: str = 'data'  # or 'fsdp'

  def __post_init__(self):
    axes = self.axes
    for name, size in axes.items():
      if size != -1 and size < 1:
        raise ValueError(f'mesh.{name}={size} must be positive, or -1')
    if list(axes.values()).count(-1) > 1:
      raise ValueError(f'only one mesh axis may be -1, not {axes}')
    _positive(**{'mesh.slices': self.slices})
    _choice('mesh.slice_axis', self.slice_axis, ('data', 'fsdp'))

  @property
  def axes(self) -> dict[str, int]:
    """Axis name to size, outermost first."""
    return {
      name: getattr(self, name)
      for name in ('data', 'fsdp', 'expert', 'context', 'tensor')
    }


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is kept on disk. See gated_jax/training/checkpoint.py."""

  every: int = 500  # steps; 0: only the last one
  keep_last: int = 2
  keep_best: int = 1  # by validation loss
  asynchronous: bool = True

  def __post_init__(self):
    _not_negative(
      **{
        'checkpoint.every': self.every,
        'checkpoint.keep_best': self.keep_best,
      }
    )
    _positive(**{'checkpoint.keep_last': self.keep_last})


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run: what train.py builds from a file in configs/ and flags."""

  steps: int = 1000
  seed: int = 0
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
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()

  def __post_init__(self):
    _positive(
      steps=self.steps,
      log_every=self.log_every,
      eval_batches=self.eval_batches,
      max_bad_steps=self.max_bad_steps,
    )
    _seed(seed=self.seed)
    _not_negative(
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


def to_dict(config: Any) -> dict[str, Any]:
  """Nested plain values: what JSON and ConfigDict can hold."""
  return dataclasses.asdict(config)


def from_dict(
  values: Mapping[str, Any], default: Any = RunConfig(), path: str = ''
) -> Any:
  """The dataclass of `default` with `values` put in.

  Lists become tuples and whole numbers become floats where the default is
  one; nothing else is converted. Unknown names and wrong types are refused.
  """
  fields = {f.name for f in dataclasses.fields(default)}
  found: dict[str, Any] = {}
  for name, value in values.items():
    if name not in fields:
      near = difflib.get_close_matches(str(name), sorted(fields), n=1)
      hint = f'; did you mean {path}{near[0]}?' if near else ''
      raise ValueError(f'there is no setting {path}{name}{hint}')
    old = getattr(default, name)
    if dataclasses.is_dataclass(old):
      if not isinstance(value, Mapping):
        raise ValueError(f'{path}{name}={value!r} must be a group of settings')
      found[name] = from_dict(value, old, f'{path}{name}.')
    else:
      found[name] = _as_type_of(old, value, f'{path}{name}')
  return dataclasses.replace(default, **found)


def _as_type_of(old: Any, value: Any, name: str) -> Any:
  kind = type(old)
  if kind is tuple and isinstance(value, list | tuple):
    # The only empty default is a tuple of strings; the others show their type.
    like = old[0] if old else ''
    return tuple(_as_type_of(like, item, name) for item in value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise ValueError(
      f'{name}={value!r} must be of type {kind.__name__}, '
      f'not {type(value).__name__}'
    )
  return value


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], path: str = ''
) -> dict[str, tuple[Any, Any]]:
  """Settings that differ: full name to (old value, new value)."""
  found: dict[str, tuple[Any, Any]] = {}
  absent = object()
  for name in {**old, **new}:
    a, b = old.get(name, absent), new.get(name, absent)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found |= differences(a, b, f'{path}{name}.')
      continue
    a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    if a != b:
      a, b = ('(none)' if x is absent else x for x in (a, b))
      found[f'{path}{name}'] = (a, b)
  return found
