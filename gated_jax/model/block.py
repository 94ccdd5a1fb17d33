"""One layer of a decoder: mixer, then MLP or experts, each added to the stream.

    x += mixer(norm(x))        x += ffn(norm(x))

Norms stand there ('pre'), on what is added ('post'), or on both ('sandwich').
With `config.residual='depth_scaled'` a sum of n terms, the embedding included,
is divided by sqrt(n):

    x = sqrt((n - 1) / n) x + sqrt(1 / n) y

With 'gated' each channel has its own share b of what is added, and the stream
keeps its size where both are independent and equally large:

    b = sigmoid(logits / temperature)      x = sqrt(1 - b^2) x + b y

What backward recomputes is `config.remat`; arrays are saved by name:

    none       nothing is recomputed
    minimal    norms and products only: every matmul's output is saved
    attention  the MLP as well: what attention reads and writes is saved
    exchange   all but what is sent to other devices' experts, and to which
    full       everything but the inputs of the layers
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax import sharding
from gated_jax.config import LayerSpec
from gated_jax.config import ModelConfig
from gated_jax.model import stream
from gated_jax.model.gate import LOGITS_NAME
from gated_jax.model.layers import MEAN_NAME
from gated_jax.model.layers import MLP
from gated_jax.model.layers import post_norm
from gated_jax.model.layers import scale_of
from gated_jax.model.mixer import Context
from gated_jax.model.mixer import State
from gated_jax.model.mixers import mixer_named
from gated_jax.model.moe import REDUCED_NAME
from gated_jax.model.moe import ROUTING_NAME
from gated_jax.model.moe import SUM_NAME
from gated_jax.model.moe import MoE
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import parameter
from gated_jax.ops import probes
from gated_jax.ops.attention.spec import LSE_NAME
from gated_jax.ops.attention.spec import OUTPUT_NAME
from gated_jax.ops.delta.pallas_tpu.call import RESIDUALS_NAME
from gated_jax.ops.moe import PRODUCT_NAME
from gated_jax.ops.moe import ROWS_NAME

# Group ('losses' or 'logs'), then name, to one number of a layer, or to an
# array of numbers of several layers.
Extras = dict[str, dict[str, Array]]

_GATED = (LOGITS_NAME, OUTPUT_NAME, LSE_NAME)
# The names that each policy saves; 'none' is no policy at all.
SAVED: dict[str, tuple[str, ...]] = {
  'full': (),
  'exchange': (ROUTING_NAME, ROWS_NAME, SUM_NAME),
  'attention': ('query', 'key', 'value', *_GATED, MEAN_NAME),
  'minimal': (
    'query_projection',
    'key_projection',
    'value_projection',
    'input_gate_projection',
    'output_gate_projection',
    *_GATED,
    RESIDUALS_NAME,
    'attention_result',
    'mlp_gate',
    'mlp_up',
    ROUTING_NAME,
    REDUCED_NAME,
    ROWS_NAME,
    PRODUCT_NAME,
    SUM_NAME,
    MEAN_NAME,
  ),
}


# A channel keeps the root of this at least: the slope of a root has no bound
# where an output takes the whole.
LEAST_OF_STREAM = 1e-3


class Output(NamedTuple):
  """A layer's results beside the residual stream."""

  state: State | None
  extras: Extras


class Block(nn.Module):
  """A layer, as its `LayerSpec` says."""

  config: ModelConfig
  layer: LayerSpec

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    state: State | None,
    ctx: Context,
    number: Int[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Output]:
    """Runs the layer.

    Args:
      x: the residual stream.
      state: of the mixer.
      ctx: what all layers share.
      number: of this layer, from 0; None: sums are not divided.
    """
    c, layer = _of_call(self.config, ctx), self.layer
    # Terms of both sums: the embedding, and two of each layer.
    terms = (None, None) if number is None else (2 * number + 2, 2 * number + 3)
    # The submodule has the mixer's word for its name.
    mixer: Any = mixer_named(layer.mixer)
    mixer = mixer(c, layer, name=layer.mixer)
    x, h = self._read(f'{layer.mixer}_norm', x)
    y, state = mixer(h, ctx, state)
    x = self._add((x, y), layer.mixer, ctx, terms[0])
    x = checkpoint_name(x, 'attention_result')
    x, h = self._read('mlp_norm', x)
    extras: Extras = {}
    if layer.ffn == 'moe':
      limits = layer.limit, layer.shared_limit
      saved = SAVED.get(c.remat, (ROWS_NAME, PRODUCT_NAME))
      moe = MoE(c, layer.ffn_width, *limits, saved, name='moe')
      y, losses, logs = moe(h, ctx.valid)
      extras = {'losses': losses, 'logs': logs}
    else:
      y = MLP(c, layer.ffn_width, layer.limit, name='mlp')(h)
    x = self._add((x, y), 'mlp', ctx, terms[1])
    if self.is_mutable_collection('probes') and not self.is_initializing():
      valid = ctx.valid
      valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
      self.sow('probes', 'residual_max', probes.largest_activation(x, valid))
    return x, Output(state, extras)

  def _read(self, name: str, x: Array) -> tuple[Array, Array]:
    """The residual stream, and what a block reads of it."""
    c = self.config
    if (self.layer.norm or c.norm) == 'post':
      return x, x
    scale = scale_of(c, name, x.shape[-1])
    return stream.read(x, scale, c.norm_eps, c.attention)

  def _add(
    self,
    arrays: tuple[Array, Array],
    name: str,
    ctx: Context,
    terms: Int[Array, ''] | None,
  ) -> Array:
    """The residual stream plus a block's output.

    Args:
      arrays: the stream, and the output.
      name: what its norm's and its shares' names begin with; there is a norm
        but if 'pre'.
      ctx: what all layers share.
      terms: how many there are in the sum, whose root divides it; None: it
        stays as it is.
    """
    c = self.config
    x, y = arrays
    if (self.layer.norm or c.norm) != 'pre':
      place = c.ffn_post_scale if name == 'mlp' else c.mixer_post_scale
      y = post_norm(c, f'{name}_post_norm', place, y)
    if c.dropout:
      y = nn.Dropout(c.dropout, deterministic=ctx.deterministic)(y)
    if c.residual == 'gated':
      shares = Shares(c.width, c.residual_temperature, name=f'{name}_shares')
      of_stream, of_output = shares()
      x = (of_stream * x + of_output * y).astype(x.dtype)
    elif terms is None:
      x += y.astype(x.dtype)
    else:
      one = 1 / terms.astype(jnp.promote_types(x.dtype, jnp.float32))
      x = (jnp.sqrt(1 - one) * x + jnp.sqrt(one) * y).astype(x.dtype)
    return sharding.constrain(x, *sharding.RESIDUAL)


def _of_call(config: ModelConfig, ctx: Context) -> ModelConfig:
  """The settings of one call: adapters drop inputs in training alone.

  Whatever owns a matrix reads them off the module around it (`parameters.py`),
  and so need not know in which kind of call it stands.
  """
  if not (ctx.deterministic and config.lora.dropout):
    return config
  lora = dataclasses.replace(config.lora, dropout=0.0)
  return dataclasses.replace(config, lora=lora)


class Shares(nn.Module):
  """Owns `logits` [D]: how much of each channel an output is, and the stream.

  The squares of both shares sum to one.
  """

  size: int
  temperature: float

  @nn.compact
  def __call__(self) -> tuple[Float[Array, ' D'], Float[Array, ' D']]:
    """The factor of the stream, and that of the output."""
    logits = parameter(
      self,
      'logits',
      (self.size,),
      (None,),
      Kind.VECTOR,
      init=nn.initializers.zeros,
      dtype='float32',
    )
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    wide /= self.temperature
    share = jax.nn.sigmoid(wide)
    # 1 - b would lose the last of the stream to rounding.
    rest = jnp.maximum(jax.nn.sigmoid(-wide) * (1 + share), LEAST_OF_STREAM)
    return jnp.sqrt(rest), share


class Period(nn.Module):
  """The layers of one repetition of the pattern."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    states: Any,
    ctx: Context,
    number: Int[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Output]:
    """Runs the layers; `number` is that of the first, see `Block`."""
    outputs = []
    pattern = self.config.layers[len(self.config.lead) :]
    for i, layer in enumerate(pattern[: len(self.config.pattern)]):
      state = None if states is None else states[i]
      block = with_remat(self.config)(self.config, layer, name=f'block_{i}')
      at = None if number is None else number + i
      x, output = block(x, state, ctx, at)
      outputs.append(output)
    new_states = None if states is None else tuple(o.state for o in outputs)
    return x, Output(new_states, collect([o.extras for o in outputs]))


def with_remat(config: ModelConfig) -> Any:
  """`Block`, with the config's policy of what backward recomputes."""
  if config.remat == 'none':
    return Block
  policy = jax.checkpoint_policies.save_only_these_names(*SAVED[config.remat])
  # A scan keeps backward apart from forward by itself.
  return nn.remat(Block, policy=policy, prevent_cse=not config.scan)


def collect(extras: list[Extras]) -> Extras:
  """The numbers of several layers, each stacked over those that have it."""
  by_name: dict[str, dict[str, list[Array]]] = {}
  for layer in extras:
    for group, numbers in layer.items():
      for name, x in numbers.items():
        by_name.setdefault(group, {}).setdefault(name, []).append(x)
  return jax.tree.map(jnp.stack, by_name, is_leaf=lambda x: isinstance(x, list))


def join(lead: Extras, repeated: Extras) -> Extras:
  """The numbers of the lead's layers, then those of the scanned ones."""
  joined = {group: dict(numbers) for group, numbers in repeated.items()}
  for group, numbers in lead.items():
    for name, x in numbers.items():
      scanned = joined.setdefault(group, {})
      rest = [scanned[name].ravel()] if name in scanned else []
      scanned[name] = jnp.concatenate([x, *rest])
  return joined
