"""Rotary position embedding: channel pairs rotate by position * frequency.

    (a, b) -> (a cos - b sin, b cos + a sin),  angle = position * frequency

Of the R = head_dim * fraction channels that rotate, c pairs with c + R / 2: the
rotate-half layout of Hugging Face, whose formulas for linear interpolation,
YaRN (arXiv 2309.00071), Llama 3 and proportional rotation are used here.
`rotation` is made once per batch, `rotate` applies it to queries and keys of
every layer.
"""

import math
from typing import NamedTuple
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int


class RopeSpec(Protocol):
  """Which frequencies, and how they stretch; hashable.

  `gated_jax.config.RopeConfig` is one, and has the defaults and the checks.
  """

  @property
  def base(self) -> float:
    """The frequency of pair c is base ** (-c / pairs)."""
    ...

  @property
  def fraction(self) -> float:
    """Share of head_dim that rotates."""
    ...

  @property
  def scaling(self) -> str:
    """'none', 'linear', 'yarn', 'llama3' or 'proportional'."""
    ...

  @property
  def factor(self) -> float:
    """New length over original_length."""
    ...

  @property
  def original_length(self) -> int:
    """The length that the weights were trained with."""
    ...

  @property
  def beta_fast(self) -> float:
    """Turns in original_length above which pairs stay as they are."""
    ...

  @property
  def beta_slow(self) -> float:
    """Turns in original_length below which pairs are interpolated."""
    ...

  @property
  def attention_factor(self) -> float:
    """Scale of cos and sin; 0: from factor and the mscales."""
    ...

  @property
  def mscale(self) -> float:
    """Numerator of that scale, as DeepSeek has it; 0: there is none."""
    ...

  @property
  def mscale_all_dim(self) -> float:
    """Its denominator; 0: there is none."""
    ...

  @property
  def truncate(self) -> bool:
    """Tells whether the range of interpolation is rounded to whole pairs."""
    ...

  @property
  def low_turns(self) -> float:
    """Turns in original_length below which llama3 slows pairs by factor."""
    ...

  @property
  def high_turns(self) -> float:
    """Turns in original_length above which it leaves them as they are."""
    ...


class Rotation(NamedTuple):
  """Cosine and sine for each of the C = R / 2 pairs.

  YaRN's attention factor is multiplied into both.
  """

  cos: Float[Array, 'B T C']
  sin: Float[Array, 'B T C']


def _yarn_interpolated(channels: int, spec: RopeSpec) -> np.ndarray:
  """How far each pair is interpolated: 0 for fast ones to 1 for slow ones."""

  def pair(turns: float) -> float:
    """The (fractional) pair with so many turns in original_length."""
    wavelength = spec.original_length / (2 * math.pi * turns)
    return channels * math.log(wavelength) / (2 * math.log(spec.base))

  low, high = pair(spec.beta_fast), pair(spec.beta_slow)
  if spec.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, channels - 1)
  if low == high:
    high += 0.001
  return np.clip((np.arange(channels // 2) - low) / (high - low), 0, 1)


def _frequencies(channels: int, spec: RopeSpec) -> np.ndarray:
  """Radians per token of each pair, in float64."""
  plain = spec.base ** -(np.arange(0, channels, 2) / channels)
  if spec.scaling == 'linear':
    return plain / spec.factor
  if spec.scaling == 'proportional':
    plain[int(channels * spec.fraction) // 2 :] = 0
    return plain / spec.factor
  if spec.scaling == 'yarn':
    share = _yarn_interpolated(channels, spec)
    return plain * (share / spec.factor + 1 - share)
  if spec.scaling == 'llama3':
    turns = spec.original_length * plain / (2 * math.pi)
    share = (turns - spec.low_turns) / (spec.high_turns - spec.low_turns)
    share = np.clip(share, 0, 1)
    return plain * ((1 - share) / spec.factor + share)
  return plain


def _attention_factor(spec: RopeSpec) -> float:
  """The factor that YaRN multiplies queries by, and keys too."""
  if spec.scaling != 'yarn':
    return 1.0
  if spec.attention_factor:
    return spec.attention_factor

  def scale(mscale: float) -> float:
    """YaRN's scale of cosines and sines (2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(spec.factor) + 1 if spec.factor > 1 else 1.0

  if spec.mscale and spec.mscale_all_dim:
    return scale(spec.mscale) / scale(spec.mscale_all_dim)
  return scale(1.0)


def rotation(
  positions: Int[Array, 'B T'], head_dim: int, spec: RopeSpec
) -> Rotation:
  """The rotation of each position, in float32 and accurate to float32.

  position * frequency in float32 would be off by 0.004 radians at position
  128k. So the angle is taken as a 32-bit fraction of a turn, whose whole turns
  overflow away exactly, and only the remainder of a frequency beyond those
  32 bits is multiplied in floating point.

  Raises:
    ValueError: `fraction` of `head_dim` is no even number of channels.
  """
  whole_head = spec.scaling == 'proportional'
  channels = head_dim if whole_head else int(head_dim * spec.fraction)
  if channels <= 0 or channels % 2:
    raise ValueError(
      f'fraction={spec.fraction} of {head_dim=} must be an even number of '
      f'channels, not {channels}'
    )
  units = _frequencies(channels, spec) * (2**32 / (2 * math.pi))
  whole = np.floor(units)
  wrapped = (whole % 2**32).astype(np.uint32).view(np.int32)
  rest = (units - whole).astype(np.float32)
  p = positions.astype(jnp.int32)[..., None]
  fraction = (p * wrapped).astype(jnp.float32) + p.astype(jnp.float32) * rest
  angle = fraction * np.float32(2 * math.pi / 2**32)
  factor = np.float32(_attention_factor(spec))
  return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def rotate(
  x: Float[Array, 'B T N H'], rotation: Rotation
) -> Float[Array, 'B T N H']:
  """Queries or keys, rotated; other channels pass through."""
  cos, sin = (r[:, :, None] for r in rotation)
  half = cos.shape[-1]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  # Split before widening and rounded before joining: XLA:TPU then makes no
  # float32 copy of x, which is half of the cost by its estimates.
  a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
  a, b = a.astype(wide), b.astype(wide)
  rotated = a * cos - b * sin, b * cos + a * sin
  narrow = [part.astype(x.dtype) for part in rotated]
  return jnp.concatenate([*narrow, rest], axis=-1)
