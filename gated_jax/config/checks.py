"""Checks that several settings share; each names the value that it refuses."""

import math


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(allowed)}')


def positive(**values: int | float) -> None:
  for name, value in values.items():
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'{name}={value} must be positive')
    if isinstance(value, int) and value >= 2**31:  # devices count in int32
      raise ValueError(f'{name}={value} must be below 2**31')


def not_negative(**values: int | float) -> None:
  for name, value in values.items():
    if not (math.isfinite(value) and value >= 0):
      raise ValueError(f'{name}={value} must not be negative')


def valid_seed(**values: int) -> None:
  for name, value in values.items():
    if not 0 <= value < 2**31:
      raise ValueError(f'{name}={value} must lie in [0, 2**31)')


def below_one(**values: int | float) -> None:
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name}={value} must lie in [0, 1)')
