"""The order in which units are read: shuffled anew each epoch, and dealt.

The shuffle is Grain's (a Simon cipher of four rounds, walked along its cycles
until it stays below the count; arXiv and specification: ia.cr/2013/404), for
whole epochs at once in NumPy. Grain evaluates it one place at a time, which
for two units walks 32 thousand steps on average. The order is part of what a
saved position means, so it must never change. Read
`gated_jax/data/documents.py` next.
"""

import dataclasses

import numpy as np
from jaxtyping import Int
from jaxtyping import Int64

_WORD = 0xFFFFFFFF
_TABLE = 1 << 16  # the cipher's smallest block: all of it fits in a table
_PART = 1 << 16  # places of a long epoch that are evaluated at once


def permutation(count: int, seed: int) -> Int64[np.ndarray, ' N']:
  """A shuffled range(count); the same for ever for the same seed."""
  if count <= _TABLE:
    return _small_permutation(count, seed)
  return _places(np.arange(count), count, seed)


def _small_permutation(count: int, seed: int) -> Int64[np.ndarray, ' N']:
  if count == 1:
    return np.zeros(1, np.int64)
  everything = np.arange(_TABLE)
  after = _encrypt(everything, _round_keys(seed), 8)
  # The place that a walk from each value has reached. Each pass doubles the
  # steps, and a walk ends below the count. Cycles that never come there hold no
  # place that is asked for.
  ends = np.where(everything < count, everything, after)
  while (ends[after[:count]] >= count).any():
    ends = ends[ends]
  return ends[after[:count]]


def _places(
  index: Int[np.ndarray, ' N'], count: int, seed: int
) -> Int64[np.ndarray, ' N']:
  """The shuffled place of `index` in range(count), longer than the table."""
  bits = int(np.ceil(np.log2(count - 1)))
  half = (bits + bits % 2) // 2
  keys = _round_keys(seed)
  values = _encrypt(index.astype(np.int64), keys, max(half, 8))
  while True:
    outside = np.flatnonzero(values >= count)
    if not len(outside):
      return values
    values[outside] = _encrypt(values[outside], keys, max(half, 8))


def _encrypt(
  values: Int64[np.ndarray, ' N'], keys: list[int], bits: int
) -> Int64[np.ndarray, ' N']:
  """Four rounds on the two halves of each value, of `bits` bits each."""
  mask = (1 << bits) - 1

  def rotate(x, by):
    """A rotation of the word's bits to the left."""
    return ((x << by) | (x >> (bits - by))) & mask

  def mix(x):
    """Simon's round function, which makes bits depend on each other."""
    return (rotate(x, 1) & rotate(x, 8)) ^ rotate(x, 2)

  left, right = (values >> bits) & mask, values & mask
  mixed = mix(np.arange(1 << bits))  # far fewer than the values, or as many
  for first, second in (keys[:2], keys[2:]):
    left = left ^ mixed[right] ^ (first & mask)
    right = right ^ mixed[left] ^ (second & mask)
  return (left << bits) | right


def _round_keys(seed: int) -> list[int]:
  """Four words as std::seed_seq of C++ makes them from one."""
  seed &= _WORD

  def scramble(x):
    """Xors high bits into low ones."""
    return x ^ (x >> 27)

  words = [0x8B8B8B8B] * 4
  for k in range(4):
    ahead, far = (k + 1) % 4, (k + 2) % 4
    x = 1664525 * scramble(words[k] ^ words[ahead] ^ words[k - 1]) & _WORD
    words[ahead] = (words[ahead] + x) & _WORD
    # The length of the seed first, then the seed itself.
    x = (x + (1, 1 + seed, 2, 3)[k]) & _WORD
    words[far] = (words[far] + x) & _WORD
    words[k] = x
  for k in range(4):
    ahead, far = (k + 1) % 4, (k + 2) % 4
    total = (words[k] + words[ahead] + words[k - 1]) & _WORD
    x = 1566083941 * scramble(total) & _WORD
    words[ahead] ^= x
    x = (x - k) & _WORD
    words[far] ^= x
    words[k] = x
  return words


@dataclasses.dataclass(frozen=True)
class Deal:
  """Which units a process reads: every `shards`-th of the shuffled ones."""

  count: int  # units of all processes
  seed: int  # seed of the shuffle; -1: none
  shard: int = 0
  shards: int = 1


class Order:
  """Maps places in an endless stream of units to numbers of units.

  Args:
    deal: the units of one epoch.
    epochs: how many there are; 0: no end.
  """

  def __init__(self, deal: Deal, epochs: int):
    self._deal = deal
    self.epoch = len(range(deal.shard, deal.count, deal.shards))
    self.places = epochs * self.epoch  # 0: no end
    self._part, self._units = (-1, -1), np.empty(0, np.int64)

  def unit(self, place: int) -> int:
    """The number of the unit at `place`."""
    epoch, offset = divmod(place, self.epoch)
    part, offset = divmod(offset, _PART)
    if self._part != (epoch, part):
      self._part, self._units = (epoch, part), self._evaluate(epoch, part)
    return int(self._units[offset])

  def _evaluate(self, epoch: int, part: int) -> Int64[np.ndarray, ' N']:
    deal = self._deal
    dealt = np.arange(deal.shard, deal.count, deal.shards)
    dealt = dealt[part * _PART : (part + 1) * _PART]
    if deal.seed < 0:
      return dealt
    seed = (deal.seed + epoch) % 2**32
    if deal.count <= _TABLE:
      return _small_permutation(deal.count, seed)[dealt]
    return _places(dealt, deal.count, seed)
