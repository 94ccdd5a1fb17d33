"""Layers that know nothing of attention: norms, MLP, embedding.

Modules own parameters, functions compute with them: `Scale` gives a norm's
scale and `rms_norm` applies it. Parameters are stored in one dtype and used
in another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.config import ModelConfig
from gated_jax.model.linear import Kernel
from gated_jax.model.linear import Matrix
from gated_jax.model.linear import project
from gated_jax.model.parameters import Kind
from gated_jax.model.parameters import normal
from gated_jax.model.parameters import parameter
from gated_jax.ops import embed as ops
from gated_jax.ops import swiglu
from gated_jax.sharding import Axes
from gated_jax.sharding import constrain
from gated_jax.sharding import mesh_axes
from gated_jax.sharding import parts
from gated_jax.sharding import per_device

# Remat policies know the mean square of a norm's input by this name.
MEAN_NAME = 'norm_mean'


class Scale(nn.Module):
  """Owns the parameter `scale` of a norm, [D], and gives it in float32."""

  size: int
  zero_centered: bool = False  # stored as its distance from one
  param_dtype: Any = 'float32'
  boxed: bool = True

  @nn.compact
  def __call__(self) -> Float[Array, ' D']:
    ones = nn.initializers.ones
    scale = parameter(
      self,
      'scale',
      (self.size,),
      (None,) if self.boxed else None,
      Kind.VECTOR,
      init=nn.initializers.zeros if self.zero_centered else ones,
      dtype=self.param_dtype,
    )
    wide = jnp.promote_types(scale.dtype, jnp.float32)
    return scale.astype(wide) + (1 if self.zero_centered else 0)


def bare_norm(x: Float[Array, '*b D'], eps: float) -> Float[Array, '*b D']:
  """`rms_norm` without a scale."""
  return rms_norm(x, jnp.ones(x.shape[-1:]), eps)


def rms_norm(
  x: Float[Array, '*b D'], scale: Float[Array, ' D'], eps: float
) -> Float[Array, '*b D']:
  """x / sqrt(mean(x^2) + eps) * scale, over the last axis, in float32.

  From Root Mean Square Layer Normalization (arXiv 1910.07467).
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return divide_by_root(x, jnp.mean(wide * wide, axis=-1), scale, eps)


def divide_by_root(
  x: Float[Array, '*b D'],
  mean: Float[Array, '*b'],
  scale: Float[Array, ' D'],
  eps: float,
) -> Float[Array, '*b D']:
  """`rms_norm` of x, whose squares have this mean."""
  wide = x.astype(mean.dtype)
  # One number a token is cheap to save, and recomputing it reads all of x.
  mean = checkpoint_name(mean, MEAN_NAME)
  inverse = jax.lax.rsqrt(mean + eps)[..., None]
  return (wide * inverse * scale.astype(wide.dtype)).astype(x.dtype)


def norm(
  config: ModelConfig, name: str, x: Float[Array, '*b D'], eps: float = 0.0
) -> Float[Array, '*b D']:
  """RMSNorm by a scale that the calling module owns under this name.

  Args:
    config: of the model.
    name: of the scale's module.
    x: input.
    eps: 0: the config's norm_eps.
  """
  scale = scale_of(config, name, x.shape[-1])
  return rms_norm(x, scale, eps or config.norm_eps)


def scale_of(config: ModelConfig, name: str, size: int) -> Float[Array, ' D']:
  """A norm's scale, which the calling module owns under this name."""
  kinds = config.norm_zero_centered, config.param_dtype
  return Scale(size, *kinds, name=name)()


def post_norm(
  config: ModelConfig, name: str, place: str, x: Float[Array, '*b D']
) -> Float[Array, '*b D']:
  """The norm of an output, by a scale that the calling module owns.

  Args:
    config: of the model.
    name: of the scale's module.
    place: where the scale stands; see `ModelConfig.mixer_post_scale`.
    x: the output.
  """
  if place == 'after':
    return norm(config, name, x, config.output_eps)
  if place == 'none':
    return bare_norm(x, config.output_eps)
  scale = scale_of(config, name, x.shape[-1])
  # Wide until the norm divides it: a scale of the output rounds nothing twice.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  wide = bare_norm(wide * scale.astype(wide.dtype), config.output_eps)
  return wide.astype(x.dtype)


class MLP(nn.Module):
  """SwiGLU (arXiv 2002.05202): down(silu(gate_proj x) * up x)."""

  config: ModelConfig
  width: int
  limit: float = 0.0  # see gated_jax/ops/swiglu.py

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config

    def kernel(name: str, shape: tuple[int, ...], axes: Axes) -> Matrix:
      """A matrix with the model's initial spread."""
      return Kernel(shape, axes, 1, c.init_std, c.param_dtype, name=name)()

    shape, axes = (c.width, self.width), ('embed', 'mlp')
    gate = project(x, kernel('gate_proj', shape, axes), c.dtype, 'mlp_gate')
    up = project(x, kernel('up', shape, axes), c.dtype, 'mlp_up')
    hidden = swiglu.hidden(gate, up, self.limit)
    hidden = constrain(hidden, 'batch', 'length', 'mlp')
    return project(hidden, kernel('down', shape[::-1], axes[::-1]), c.dtype)


class Embed(nn.Module):
  """Owns `embedding` [V, D], and looks tokens up in it."""

  config: ModelConfig

  def setup(self) -> None:
    """Makes the table."""
    c = self.config
    self.embedding = parameter(
      self,
      'embedding',
      (c.vocab, c.width),
      ('vocab', 'embed'),
      Kind.EMBEDDING,
      init=normal(c.init_std),
      dtype=c.param_dtype,
    )

  def __call__(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
    x = ops.embed(self.embedding, tokens, self._spec(), _on_each_device)
    return self._finished(x)

  def with_inlet(
    self, tokens: Int[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'b t V D']]:
    """The rows, and the inlet for the gradient of a loss by this table."""
    axes = zip(('batch', 'length'), tokens.shape, strict=True)
    b, t = (parts(name, size) for name, size in axes)
    x, inlet = ops.embed_with_inlet(
      self.embedding, tokens, self._spec(), _on_each_device, (b, t)
    )
    return self._finished(x), inlet

  def _spec(self) -> ops.EmbedSpec:
    return ops.EmbedSpec(
      dtype=self.config.dtype,
      token_axes=mesh_axes('batch') + mesh_axes('length'),
      vocab_axis=''.join(mesh_axes('vocab')),
      width_axes=mesh_axes('embed'),
    )

  def _finished(self, x: Array) -> Array:
    return bare_norm(x, self.config.norm_eps) if self.config.embed_norm else x


# Logical axes of an embedding's inlet: the gradient of each device's tokens.
INLET = ('batch', 'length', 'vocab', None)


def _on_each_device(
  function: Callable[..., Any], differentiate: bool
) -> Callable[..., Any]:
  """The lookup on each device's tokens and part of the table."""
  tokens, table = ('batch', 'length'), ('vocab', 'embed')
  rows = (*tokens, None)
  if differentiate:
    inputs = rows, tokens, table, INLET
    return lambda *arrays: per_device(function, inputs[: len(arrays)], table)(
      *arrays
    )
  return per_device(function, (table, tokens), rows)


class Unembed(nn.Module):
  """Owns `kernel` [D, V]; the loss multiplies by it in chunks."""

  config: ModelConfig

  def setup(self) -> None:
    """Makes the matrix."""
    c = self.config
    self.kernel = parameter(
      self,
      'kernel',
      (c.width, c.vocab),
      ('embed', 'vocab'),
      Kind.EMBEDDING,
      init=normal(c.init_std),
      dtype=c.param_dtype,
    )

  def __call__(self) -> Float[Array, 'D V']:
    return self.kernel
