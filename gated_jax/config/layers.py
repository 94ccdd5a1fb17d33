"""Settings of the parts that layers are made of."""

import dataclasses
from typing import ClassVar

from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.roles import setting

SCALINGS = ('none', 'linear', 'yarn', 'llama3', 'proportional')
DELTA_GATES = ('silu', 'sigmoid')


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding. Names and formulas as Hugging Face has them."""

  ROLE: ClassVar[str] = 'model'

  base: float = 10_000.0
  fraction: float = 1.0  # share of head_dim that rotates (partial rotary)
  # 'linear', 'yarn' and 'llama3' stretch it. 'proportional' spreads pairs and
  # frequencies over the whole head and stops all but the first `fraction`.
  scaling: str = 'none'
  factor: float = 1.0  # new length over original_length
  # The length that the weights were trained with (yarn, llama3).
  original_length: int = 0
  # Channels that turn more often than beta_fast in original_length stay as they
  # are; those that turn less often than beta_slow are interpolated (yarn).
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0  # 0: from factor, as the YaRN paper does
  mscale: float = 0.0
  mscale_all_dim: float = 0.0
  truncate: bool = True  # round the correction range to whole channels
  # Channels that turn less than low_turns times in original_length are slowed
  # by `factor`, those that turn more than high_turns times are not (llama3).
  low_turns: float = 1.0
  high_turns: float = 4.0

  def __post_init__(self) -> None:
    finite('rope.', self)
    choice('rope.scaling', self.scaling, SCALINGS)
    positive(**{'rope.base': self.base, 'rope.fraction': self.fraction})
    if self.fraction > 1:
      raise ValueError(f'rope.fraction={self.fraction} must be at most 1')
    if self.factor < 1:
      raise ValueError(f'rope.factor={self.factor} must be at least 1')
    if self.scaling == 'none' and self.factor != 1:
      raise ValueError(
        f"rope.factor={self.factor} does nothing with rope.scaling='none'"
      )
    if self.scaling in ('yarn', 'llama3') and self.original_length <= 0:
      raise ValueError(
        f'rope.scaling={self.scaling!r} needs rope.original_length, the length '
        f'the weights were trained with, not {self.original_length}'
      )
    if self.scaling == 'yarn':
      self._check_yarn()
    if self.scaling == 'llama3' and not 0 < self.low_turns < self.high_turns:
      raise ValueError(
        f'rope.low_turns={self.low_turns} must lie between 0 and '
        f'rope.high_turns={self.high_turns}'
      )

  def _check_yarn(self) -> None:
    """Refuses what YaRN would take the logarithm of in vain."""
    for name, least in (('base', 1), ('beta_fast', 0), ('beta_slow', 0)):
      if getattr(self, name) <= least:
        raise ValueError(
          f'rope.{name}={getattr(self, name)} must be above {least} for '
          "rope.scaling='yarn'"
        )


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
  """Gated DeltaNet (arXiv 2412.06464): layers of the word gated_deltanet.

  The sizes are those of the released Qwen3-Next.
  """

  ROLE: ClassVar[str] = 'model'

  key_heads: int = 16  # each serves value_heads / key_heads value heads
  value_heads: int = 32
  key_dim: int = 128  # channels of a query's and a key's head
  value_dim: int = 128
  # Inputs that the filter before queries, keys and values sums, each token's
  # own included.
  filter_width: int = 4
  gate: str = 'silu'  # or 'sigmoid'; of the gate on the normed output
  norm_eps: float = 0.0  # of that norm; 0: the model's
  # The share that a token corrects goes up to two, beyond which what is stored
  # would grow; above one it turns what it finds around.
  doubled_beta: bool = False
  # 'chunks' in plain arrays, 'pallas_tpu' in kernels.
  implementation: str = setting('auto', 'free')

  def __post_init__(self) -> None:
    positive(
      **{
        f'delta.{name}': getattr(self, name)
        for name in (
          'key_heads',
          'value_heads',
          'key_dim',
          'value_dim',
          'filter_width',
        )
      }
    )
    finite('delta.', self)
    not_negative(**{'delta.norm_eps': self.norm_eps})
    choice('delta.gate', self.gate, DELTA_GATES)
    choice(
      'delta.implementation',
      self.implementation,
      ('auto', 'chunks', 'pallas_tpu'),
    )
    if self.value_heads % self.key_heads:
      raise ValueError(
        f'delta.value_heads={self.value_heads} must be a multiple of '
        f'delta.key_heads={self.key_heads}'
      )


@dataclasses.dataclass(frozen=True)
class ConvConfig:
  """A short convolution between two gates: layers of the word short_conv.

  The width is that of the released LFM3.
  """

  ROLE: ClassVar[str] = 'model'

  # Inputs that each channel's filter sums, the token's own included.
  filter_width: int = 7
  bias: bool = False  # on its three projections, the filter and the output

  def __post_init__(self) -> None:
    positive(**{'conv.filter_width': self.filter_width})


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Experts of the layers whose word in the pattern says `+moe`."""

  ROLE: ClassVar[str] = 'model'

  experts: int = 128
  top_k: int = 8
  width: int = 768  # hidden channels of one expert
  # Channels that experts read and write, behind a matrix and a norm that they
  # share, and before a matrix back; 0: model.width, without any of these.
  reduced_width: int = 0
  # RMSNorm of each expert's output before its weight, by one scale of all
  # experts, which stands before the division and so only turns.
  output_norm: bool = False
  # Hidden channels of an expert that every token takes; 0: there is none.
  shared_width: int = 0
  shared_gate: bool = False  # scales its output by a sigmoid of the token
  normalize: bool = True  # the chosen weights sum to one
  score: str = 'softmax'  # makes scores of the router's logits; or 'sigmoid'
  logit_scale: float = 1.0  # multiplies those logits
  # c: those logits become c tanh(logits / c); 0: they stay as they are.
  softcap: float = 0.0
  scale: float = 1.0  # multiplies the chosen weights
  # A bias that only chooses; it is trained by load, not by the loss.
  bias: bool = False
  groups: int = 1  # a token chooses experts from the best `top_groups`
  top_groups: int = 1
  # The router is stored in; 'model': in param_dtype.
  router_dtype: str = setting('model', 'execution')
  # The paper does not print these two; the values are this project's.
  balance_loss: float = setting(1e-2, 'execution')
  router_z_loss: float = setting(1e-3, 'execution')
  # Grouped matmul: 'ragged_dot', 'gmm', 'tiles'.
  implementation: str = setting('auto', 'free')
  # The next two matter where mesh.expert splits the experts. A device's tokens
  # are worked through in so many parts: rows of one travel to their experts
  # while those of another are multiplied.
  chunks: int = setting(2, 'free')
  # Rows of a buffer that travels, over an even share of them. Nothing is ever
  # dropped: where the load is less even, what is left follows in further,
  # smaller rounds, which take their time.
  slack: float = setting(1.0625, 'free')

  def __post_init__(self) -> None:
    finite('moe.', self)
    not_negative(
      **{
        'moe.shared_width': self.shared_width,
        'moe.reduced_width': self.reduced_width,
        'moe.softcap': self.softcap,
        'moe.balance_loss': self.balance_loss,
        'moe.router_z_loss': self.router_z_loss,
      }
    )
    positive(
      **{
        'moe.experts': self.experts,
        'moe.top_k': self.top_k,
        'moe.width': self.width,
        'moe.scale': self.scale,
        'moe.logit_scale': self.logit_scale,
        'moe.groups': self.groups,
        'moe.top_groups': self.top_groups,
        'moe.chunks': self.chunks,
        'moe.slack': self.slack,
      }
    )
    choice('moe.score', self.score, ('softmax', 'sigmoid'))
    choice('moe.router_dtype', self.router_dtype, ('model', 'float32'))
    choice(
      'moe.implementation',
      self.implementation,
      ('auto', 'ragged_dot', 'gmm', 'tiles'),
    )
    if self.top_k > self.experts:
      raise ValueError(
        f'moe.top_k={self.top_k} experts cannot be chosen from '
        f'moe.experts={self.experts}'
      )
    if self.shared_gate and not self.shared_width:
      raise ValueError(
        'moe.shared_gate=True has no shared expert to scale: moe.shared_width=0'
      )
    self._check_groups()
    if self.top_k == 1 and self.normalize:
      raise ValueError(
        'moe.top_k=1 with moe.normalize=True gives the one chosen expert '
        'weight 1 whatever the router says, so that the router learns nothing '
        'from the loss: set moe.normalize=False'
      )

  def _check_groups(self) -> None:
    """Refuses groups that experts or choices do not fit into."""
    if self.experts % self.groups:
      raise ValueError(
        f'moe.experts={self.experts} must be a multiple of '
        f'moe.groups={self.groups}'
      )
    if self.top_groups > self.groups:
      raise ValueError(
        f'moe.top_groups={self.top_groups} must be at most '
        f'moe.groups={self.groups}'
      )
    choices = self.experts // self.groups * self.top_groups
    if self.top_k > choices:
      raise ValueError(
        f'moe.top_k={self.top_k} experts cannot be chosen from {choices} in '
        f'moe.top_groups={self.top_groups} of moe.groups={self.groups}'
      )
