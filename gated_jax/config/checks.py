"""Checks that several settings share; each names the value that it refuses."""

import dataclasses
import math
from typing import Any

# Devices count in int32.
LARGEST = 2**31


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Refuses a word that is not one of those allowed."""
  if value not in allowed:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(allowed)}')


def finite(group: str, config: Any) -> None:
  """Refuses NaN and infinity in every float of a group of settings."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{group}{field.name}={value} must be a finite number')


def positive(**values: int | float) -> None:
  """Refuses zero, what is below it, and integers beyond int32."""
  for name, value in values.items():
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'{name}={value} must be positive')
    _within_int32(name, value)


def not_negative(**values: int | float) -> None:
  """Refuses what is below zero, and integers beyond int32."""
  for name, value in values.items():
    if not (math.isfinite(value) and value >= 0):
      raise ValueError(f'{name}={value} must not be negative')
    _within_int32(name, value)


def _within_int32(name: str, value: int | float) -> None:
  if isinstance(value, int) and value >= LARGEST:
    raise ValueError(f'{name}={value} must be below 2**31')


def valid_seed(**values: int) -> None:
  """Refuses what is no seed of a random key on every platform."""
  for name, value in values.items():
    if not 0 <= value < LARGEST:
      raise ValueError(f'{name}={value} must lie in [0, 2**31)')


def below_one(**values: int | float) -> None:
  """Refuses what is no share, or a share of everything."""
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name}={value} must lie in [0, 1)')
