"""The gate: where it acts, what its scores are made of, how they act.

Read `gated_jax/ops/gate.py` for its mathematics.
"""

import dataclasses
from typing import ClassVar

from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.roles import setting

# The places where a gate can act. In the paper's numbering sdpa_output is G1,
# value G2, key G3, query G4 and dense_output G5 (arXiv 2505.06708, 2.2).
POSITIONS = ('none', 'query', 'key', 'value', 'sdpa_output', 'dense_output')
# The kinds that give attention a logit without a value.
SINKS = ('sink_logit', 'key_bias')
KINDS = ('gate', 'rms_norm', 'silu', 'exclusive', *SINKS)
ACTIVATIONS = (
  'sigmoid',
  'silu',
  'identity',
  'ns_sigmoid',
  'two_sigmoid',
  'softplus',
)


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """The gate of a softmax attention layer, and its place.

  The default is the paper's best: Y' = Y * sigmoid(X W) on the attention
  output, one score per head and channel. `configs/gate_sweep.py` spells every
  row of the paper's tables in these words.
  """

  ROLE: ClassVar[str] = 'model'

  position: str = 'sdpa_output'
  # 'gate': scores from `source`. 'rms_norm', 'silu': no scores at all, that
  # function of each head's attention output instead (Table 3, rows 5 and 6).
  # 'exclusive': the output without its part along the token's own value
  # (arXiv 2603.09078). 'sink_logit', 'key_bias': one more logit for each head
  # that has no value. These alternatives the paper does not have.
  kind: str = 'gate'
  granularity: str = 'elementwise'  # 'headwise': one score per head
  shared: bool = False  # scores averaged over the heads (Table 1, row 12)
  mode: str = 'multiplicative'  # 'additive': scores are added
  activation: str = 'sigmoid'
  source: str = 'hidden'  # 'parameter': the same scores for every token
  channels: int = 0  # the scores read only these first channels; 0: all
  bias: bool = False  # on the gate logits
  bias_by_head: bool = False  # one number for all channels of a head
  # What that bias begins as: a gate of 4 and no weights is open by 0.98.
  bias_init: float = setting(0.0, 'execution')
  init: str = setting('normal', 'execution')  # 'zeros' is the other
  init_std: float = setting(0.02, 'execution')
  # 'model': scores are rounded as the rest of the layer.
  dtype: str = setting('float32', 'execution')

  def __post_init__(self) -> None:
    finite('gate.', self)
    choice('gate.position', self.position, POSITIONS)
    choice('gate.kind', self.kind, KINDS)
    choice('gate.granularity', self.granularity, ('elementwise', 'headwise'))
    choice('gate.mode', self.mode, ('multiplicative', 'additive'))
    choice('gate.activation', self.activation, ACTIVATIONS)
    choice('gate.source', self.source, ('hidden', 'parameter'))
    choice('gate.init', self.init, ('normal', 'zeros'))
    choice('gate.dtype', self.dtype, ('float32', 'model'))
    not_negative(
      **{'gate.channels': self.channels, 'gate.init_std': self.init_std}
    )
    if self.bias_init and not self.bias:
      raise ValueError(
        f'gate.bias_init={self.bias_init} needs gate.bias=True, which it begins'
      )
    if self.bias_by_head and not self.bias:
      raise ValueError(
        'gate.bias_by_head=True needs gate.bias=True, which it makes smaller'
      )
    self._refuse_nonsense()

  def _refuse_nonsense(self) -> None:
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
    if self.bias_by_head and self.granularity == 'headwise':
      raise ValueError(
        "gate.bias_by_head=True does nothing with gate.granularity='headwise', "
        'whose bias has one number for each head already'
      )
    if self.position == 'dense_output':
      if self.bias_by_head:
        raise ValueError(
          'gate.bias_by_head=True has no heads to act on at '
          "position='dense_output', which comes after they are joined"
        )
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
    if self.source == 'parameter' and self.bias:
      raise ValueError(
        "gate.bias=True adds to logits that source='parameter' stores already"
      )

  @property
  def has_scores(self) -> bool:
    """True where the layer owns gate parameters and computes scores."""
    return self.position != 'none' and self.kind == 'gate'

  @property
  def has_sink(self) -> bool:
    """True where attention has a logit without a value."""
    return self.kind in SINKS

  @property
  def scores_output(self) -> bool:
    """True where scores act on the attention output, before its projection."""
    return self.has_scores and self.position == 'sdpa_output'

  @property
  def fused(self) -> bool:
    """True where the attention call itself can apply the scores.

    It can where every head has its own scores, computed from the layer's
    input.
    """
    return self.scores_output and self.source == 'hidden' and not self.shared
