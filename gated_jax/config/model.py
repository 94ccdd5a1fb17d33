"""A decoder: its sizes, and the words that say what its layers are."""

import dataclasses
import functools
from typing import ClassVar

from gated_jax.config.checks import below_one
from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import not_negative
from gated_jax.config.checks import positive
from gated_jax.config.gate import GateConfig
from gated_jax.config.layers import ConvConfig
from gated_jax.config.layers import DeltaConfig
from gated_jax.config.layers import MoEConfig
from gated_jax.config.layers import RopeConfig
from gated_jax.config.lora import LoraConfig
from gated_jax.config.roles import setting
from gated_jax.config.stack import NORMS
from gated_jax.config.stack import LayerSpec
from gated_jax.config.stack import read_word

# From what saves most to what recomputes most; see model/block.py.
REMAT = ('none', 'minimal', 'attention', 'exchange', 'full')
# How a block's output joins the residual stream.
RESIDUALS = ('sum', 'depth_scaled', 'gated')
# Where the scale of a norm of a block's output stands.
POST_SCALES = ('after', 'before', 'none')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. The default is the paper's 1.7B model with 28 layers."""

  ROLE: ClassVar[str] = 'model'

  vocab: int = 151_936
  length: int = 4096  # the longest sequence it is built for
  depth: int = 28
  # The layers in words (see config/stack.py): `lead` names the first ones, and
  # `pattern` repeats over the rest.
  lead: tuple[str, ...] = ()
  pattern: tuple[str, ...] = ('attention',)
  width: int = 2048
  heads: int = 16
  kv_heads: int = 8
  head_dim: int = 128
  mlp_width: int = 6144
  tie_embeddings: bool = True
  embed_norm: bool = False  # RMSNorm, without a scale, of each token's row
  embed_scale: float = 1.0  # multiplies embeddings (muP)
  output_scale: float = 1.0  # multiplies logits (muP)
  # c: logits become c tanh(logits / c); 0: they stay as they are.
  logit_softcap: float = 0.0
  # Of the input of each block; 'post': of its output instead, 'sandwich': of
  # both. A layer's word may say another.
  norm: str = 'pre'
  # What reads the stream finds the sum of the embedding and all blocks before;
  # 'depth_scaled' divides a sum of n terms by sqrt(n), and 'gated' takes a
  # trained share of each channel from a block's output; see model/block.py.
  residual: str = 'sum'
  residual_temperature: float = 1.0  # divides the logits of those shares
  norm_eps: float = 1e-6
  # Of norms on the output of a block or of an expert; 0: norm_eps.
  post_norm_eps: float = 0.0
  # Where the scale of such a norm stands, of a mixer and of what follows it:
  # 'after' the division, 'before' it, where it only turns, or 'none'.
  mixer_post_scale: str = 'after'
  ffn_post_scale: str = 'after'
  norm_zero_centered: bool = False  # scale stored as its distance from one
  final_norm_plain: bool = False  # but the last norm's is stored as it is
  qk_norm: bool = True
  qk_norm_scale: bool = True  # False: the norms of heads own no scale
  qk_norm_joint: bool = False  # one norm of all heads of a token together
  head_norm: bool = False  # RMSNorm of each head's output, before its gate
  query_scale: float = 1.0  # multiplies queries, beside head_dim ** -0.5
  # p: queries of layers without rotary embedding are multiplied by
  # (1 + (position + 1) / query_growth_length) ** p, which counts from 0.
  query_growth: float = 0.0
  query_growth_length: int = 2048
  qkv_bias: bool = False  # on the projections of queries, keys and values
  out_bias: bool = False  # on attention's output projection
  # On attention weights and on each block's output.
  dropout: float = setting(0.0, 'execution')
  dtype: str = setting('bfloat16', 'execution')  # stored activations
  param_dtype: str = setting('float32', 'execution')
  init_std: float = setting(0.02, 'execution')
  # Attention backend: 'xla', 'cudnn', 'splash', 'pallas_tpu'.
  attention: str = setting('auto', 'free')
  scan: bool = setting(True, 'execution')  # compile one layer and loop over it
  # What the backward pass recomputes; see model/block.py.
  remat: str = setting('none', 'free')
  # Tokens per chunk of the loss; 0: chosen by the vocabulary.
  logit_chunk: int = setting(0, 'free')
  z_loss: float = setting(0.0, 'execution')
  gate: GateConfig = GateConfig()
  rope: RopeConfig = RopeConfig()
  moe: MoEConfig = MoEConfig()
  delta: DeltaConfig = DeltaConfig()
  conv: ConvConfig = ConvConfig()
  lora: LoraConfig = LoraConfig()

  def __post_init__(self) -> None:
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
          'embed_scale',
          'output_scale',
          'query_scale',
          'init_std',
          'query_growth_length',
          'residual_temperature',
        )
      }
    )
    self._check_shapes()
    choice('model.norm', self.norm, NORMS)
    choice('model.residual', self.residual, RESIDUALS)
    for name in ('mixer_post_scale', 'ffn_post_scale'):
      choice(f'model.{name}', getattr(self, name), POST_SCALES)
    choice('model.dtype', self.dtype, ('bfloat16', 'float16', 'float32'))
    choice('model.param_dtype', self.param_dtype, ('float32', 'bfloat16'))
    choice(
      'model.attention',
      self.attention,
      ('auto', 'xla', 'cudnn', 'splash', 'pallas_tpu'),
    )
    choice('model.remat', self.remat, REMAT)
    below_one(**{'model.dropout': self.dropout})
    not_negative(
      **{
        f'model.{name}': getattr(self, name)
        for name in (
          'z_loss',
          'logit_chunk',
          'logit_softcap',
          'post_norm_eps',
          'query_growth',
        )
      }
    )
    self._refuse_idle()

  def _refuse_idle(self) -> None:
    """Refuses settings that do nothing beside the others."""
    post = self.has_post_norms
    idle = {
      'post_norm_eps': self.post_norm_eps
      and not (post or self.moe.output_norm),
      'mixer_post_scale': self.mixer_post_scale != 'after' and not post,
      'ffn_post_scale': self.ffn_post_scale != 'after' and not post,
      'residual_temperature': self.residual_temperature != 1
      and self.residual != 'gated',
      'head_norm': self.head_norm
      and not any(layer.attends for layer in self.distinct_layers),
      'final_norm_plain': self.final_norm_plain and not self.norm_zero_centered,
      'qk_norm_scale': not self.qk_norm_scale and not self.qk_norm,
      'qk_norm_joint': self.qk_norm_joint and not self.qk_norm,
      'query_growth': self.query_growth and not self.has_unrotated,
    }
    needs = {
      'post_norm_eps': "model.norm='sandwich' or 'post', or moe.output_norm",
      'mixer_post_scale': "model.norm='sandwich' or 'post'",
      'ffn_post_scale': "model.norm='sandwich' or 'post'",
      'residual_temperature': "model.residual='gated'",
      'head_norm': "a layer that attends, as 'attention'",
      'final_norm_plain': 'model.norm_zero_centered=True',
      'qk_norm_scale': 'model.qk_norm=True',
      'qk_norm_joint': 'model.qk_norm=True',
      'query_growth': "a layer without rotary embedding, as 'attention:nope'",
    }
    for name, does_nothing in idle.items():
      if does_nothing:
        raise ValueError(
          f'model.{name}={getattr(self, name)!r} does nothing without '
          f'{needs[name]}'
        )

  def _check_shapes(self) -> None:
    """Refuses sizes that do not fit each other."""
    rest = self.depth - len(self.lead)
    if rest < 0:
      raise ValueError(
        f'model.lead has {len(self.lead)} words for model.depth={self.depth} '
        'layers'
      )
    if not self.pattern or rest % len(self.pattern):
      after = f' after the {len(self.lead)} of model.lead' * bool(self.lead)
      raise ValueError(
        f'model.depth={self.depth} must be a multiple of the '
        f'{len(self.pattern)} words of model.pattern{after}'
      )
    for word in {*self.lead, *self.pattern}:
      read_word(word, self).check(word)
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
    if self.moe != MoEConfig() and not self.has_experts:
      raise ValueError(
        'model.moe is set, and no layer has experts: its word in '
        f"model.pattern={list(self.pattern)} would say so, as 'attention+moe'"
      )

  @functools.cached_property
  def layers(self) -> tuple[LayerSpec, ...]:
    """Every layer, first to last."""
    repeats = (self.depth - len(self.lead)) // len(self.pattern)
    words = {
      word: read_word(word, self) for word in (*self.lead, *self.pattern)
    }
    lead = tuple(words[word] for word in self.lead)
    return lead + tuple(words[word] for word in self.pattern) * repeats

  @property
  def distinct_layers(self) -> tuple[LayerSpec, ...]:
    """The kinds of layers, in the order in which they first appear."""
    # Read from the words: the depth may be absurd where sizes are checked.
    repeats = self.depth > len(self.lead)
    words = (*self.lead, *(self.pattern if repeats else ()))
    return tuple(dict.fromkeys(read_word(word, self) for word in words))

  @property
  def has_experts(self) -> bool:
    """True where any layer has experts in place of an MLP."""
    return any(layer.ffn == 'moe' for layer in self.distinct_layers)

  @property
  def output_eps(self) -> float:
    """The constant of norms on the output of a block or of an expert."""
    return self.post_norm_eps or self.norm_eps

  @property
  def has_post_norms(self) -> bool:
    """True where any layer has norms of its blocks' outputs."""
    return any(
      (layer.norm or self.norm) != 'pre' for layer in self.distinct_layers
    )

  @property
  def has_unrotated(self) -> bool:
    """True where any layer attends without rotary embedding."""
    return any(
      layer.rope is None and layer.attends for layer in self.distinct_layers
    )

  @property
  def rotations(self) -> tuple[tuple[RopeConfig, int], ...]:
    """The different rotary embeddings of the layers, each with its head_dim."""
    used = [
      (layer.rope, layer.head_dim)
      for layer in self.distinct_layers
      if layer.rope is not None
    ]
    return tuple(dict.fromkeys(used))
