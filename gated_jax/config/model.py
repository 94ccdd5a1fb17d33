"""A decoder: its sizes, its positions, its experts."""

import dataclasses
from typing import ClassVar

from gated_jax.config.checks import below_one
from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.gate import GateConfig
from gated_jax.config.roles import setting


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding. Names and formulas as Hugging Face has them."""

  ROLE: ClassVar[str] = 'model'

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
    finite('rope.', self)
    choice('rope.scaling', self.scaling, ('none', 'linear', 'yarn'))
    positive(**{'rope.base': self.base, 'rope.fraction': self.fraction})
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

  ROLE: ClassVar[str] = 'model'

  experts: int = 0
  top_k: int = 8
  width: int = 768  # of one expert
  shared_width: int = 0  # of an expert that every token takes; 0: none
  normalize: bool = True  # the chosen weights sum to one
  # The paper does not print these two; the values are this project's.
  balance_loss: float = setting(1e-2, 'execution')
  router_z_loss: float = setting(1e-3, 'execution')
  # Grouped matmul: 'ragged_dot', 'gmm'.
  implementation: str = setting('auto', 'free')

  def __post_init__(self):
    finite('moe.', self)
    not_negative(
      **{
        'moe.experts': self.experts,
        'moe.shared_width': self.shared_width,
        'moe.balance_loss': self.balance_loss,
        'moe.router_z_loss': self.router_z_loss,
      }
    )
    positive(**{'moe.top_k': self.top_k, 'moe.width': self.width})
    choice(
      'moe.implementation', self.implementation, ('auto', 'ragged_dot', 'gmm')
    )
    if self.experts and self.top_k > self.experts:
      raise ValueError(
        f'moe.top_k={self.top_k} experts cannot be chosen from '
        f'moe.experts={self.experts}'
      )
    if self.experts and self.top_k == 1 and self.normalize:
      raise ValueError(
        'moe.top_k=1 with moe.normalize=True gives the one chosen expert '
        'weight 1 whatever the router says, so that the router learns nothing '
        'from the loss: set moe.normalize=False'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. The default is the paper's 1.7B model with 28 layers."""

  ROLE: ClassVar[str] = 'model'

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
  # On attention weights and on each block's output.
  dropout: float = setting(0.0, 'execution')
  dtype: str = setting('bfloat16', 'execution')  # of activations
  param_dtype: str = setting('float32', 'execution')
  init_std: float = setting(0.02, 'execution')
  # Attention backend: 'xla', 'cudnn', 'splash', 'pallas_tpu'.
  attention: str = setting('auto', 'free')
  scan: bool = setting(True, 'execution')  # compile one layer and loop over it
  # What the backward pass recomputes; see model/decoder.py.
  remat: str = setting('none', 'free')
  # Tokens per chunk of the loss; 0: chosen by the vocabulary.
  logit_chunk: int = setting(0, 'free')
  z_loss: float = setting(0.0, 'execution')
  gate: GateConfig = GateConfig()
  rope: RopeConfig = RopeConfig()
  moe: MoEConfig = MoEConfig()

  def __post_init__(self):
    finite('model.', self)
    positive(
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
    self._check_shapes()
    choice('model.norm', self.norm, ('pre', 'sandwich'))
    choice('model.dtype', self.dtype, ('bfloat16', 'float16', 'float32'))
    choice('model.param_dtype', self.param_dtype, ('float32', 'bfloat16'))
    choice(
      'model.attention',
      self.attention,
      ('auto', 'xla', 'cudnn', 'splash', 'pallas_tpu'),
    )
    choice('model.remat', self.remat, ('none', 'full', 'attention', 'minimal'))
    below_one(**{'model.dropout': self.dropout})
    not_negative(
      **{'model.z_loss': self.z_loss, 'model.logit_chunk': self.logit_chunk}
    )

  def _check_shapes(self):
    """Refuses sizes that do not fit each other."""
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.heads={self.heads} must be a multiple of '
        f'model.kv_heads={self.kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim={self.head_dim} must be even')
    turning = int(self.head_dim * self.rope.fraction)
    if not turning or turning % 2:
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
      not_negative(**{'model.windows': window})
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
