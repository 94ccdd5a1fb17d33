"""Seconds of a call, so that drifting clocks favour nobody.

Devices run ahead of the host and change their clocks as they warm up. So every
sample is several calls with one wait at the end, and the things compared take
turns, round by round: what a round costs one of them it costs all.
"""

import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax


class Times(NamedTuple):
  """Seconds of one call: the median over rounds, and the two extremes."""

  median: float
  low: float
  high: float

  @property
  def spread(self) -> float:
    """Distance of the extremes, relative to the median."""
    return (self.high - self.low) / self.median


def summary(samples: list[float]) -> Times:
  """The `Times` of samples in seconds, one from each round."""
  return Times(statistics.median(samples), min(samples), max(samples))


def sample(function: Callable[[], Any], calls: int) -> float:
  """Seconds of one call, in the mean of several in a row."""
  start = time.perf_counter()
  for _ in range(calls):
    result = function()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def interleaved(
  functions: Mapping[str, Callable[[], Any]],
  rounds: int = 7,
  seconds: float = 0.05,
) -> dict[str, Times]:
  """Times of each function, taken in turns.

  Args:
    functions: what to call, by name; each gives arrays to wait for.
    rounds: samples of each.
    seconds: a sample takes at least that long, as far as two calls can tell.
  """
  calls = {}
  for name, function in functions.items():
    jax.block_until_ready(function())  # compiles
    once = min(sample(function, 1) for _ in range(2))
    calls[name] = max(1, round(seconds / once))
  samples: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      samples[name].append(sample(function, calls[name]))
  return {name: summary(found) for name, found in samples.items()}
