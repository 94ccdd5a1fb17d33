"""Bigram-backcopy: sequences in which a small model grows an attention sink.

    start  d a q d t d a ...       t is a trigger: what follows it is what
                 └─┴───┘           stood before it; anything else follows the
                                   symbol before it, by a fixed random table

The table is learnt by the MLP; attention is needed after a trigger and nowhere
else. A head that cannot be silent then looks at the first token, which always
says the same (Guo et al., arXiv 2410.13835: active-dormant heads).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from gated_jax.data.files import DataFiles
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit

START = 0  # the id that every sequence begins with, and that is nowhere else
TRIGGERS = 16  # ids 1 to 16
_UNIT = 256  # sequences that are drawn together
_UNITS = 1 << 16
# How much the successors of a symbol differ in how often they come.
_CONCENTRATION = 0.1


class BackcopySource(Records):
  """Sequences that fill a row each, made from the seed and their number."""

  def __init__(self, vocab: int, length: int, seed: int, skipped: Skipped):
    """Draws the table.

    Args:
      vocab: ids, of which one starts sequences.
      length: of the row that a sequence fills.
      seed: of the table and of everything drawn from it.
      skipped: what could not be read; here nothing.
    """
    symbols = vocab - 1
    if symbols <= TRIGGERS:
      raise ValueError(
        f"data.source='backcopy' needs more than {TRIGGERS + 1} ids: a start, "
        f'{TRIGGERS} triggers and others; model.vocab={vocab}'
      )
    self.skipped = skipped
    self.files = DataFiles()
    # Cut rows are as many places as there are pairs of successors.
    self._length, self._seed = length + 1, seed
    weights = np.full(symbols, _CONCENTRATION)
    table = np.random.default_rng(seed).dirichlet(weights, symbols)
    self._table = np.cumsum(table, axis=1)
    self.units = [
      Unit('backcopy', begin, begin + _UNIT)
      for begin in range(0, _UNITS * _UNIT, _UNIT)
    ]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    rows = self.draw(np.random.default_rng((self._seed, unit.begin)))
    for number in range(max(unit.begin, cursor), unit.end):
      name = f'backcopy sequence {number}'
      yield number + 1, Document('', rows[number - unit.begin], name)

  def draw(self, rng: np.random.Generator) -> Int[np.ndarray, 'B T']:
    """The sequences of one unit."""
    chances = rng.random((_UNIT, self._length))
    rows = np.full((_UNIT, self._length), START, np.int32)
    symbol = rng.integers(0, len(self._table), _UNIT)
    for t in range(1, self._length):
      rows[:, t] = symbol + 1
      drawn = (self._table[symbol] < chances[:, t, None]).sum(axis=1)
      following = np.minimum(drawn, len(self._table) - 1)
      # Nothing copies the start.
      copies = (rows[:, t] <= TRIGGERS) & (rows[:, t - 1] != START)
      symbol = np.where(copies, rows[:, t - 1] - 1, following)
    return rows
