"""Tasks of retrieval: sentences in a text, and a question at its end.

After RULER (arXiv 2404.06654): one number (`needle`), one of several (`keys`),
and one that has to be followed through other names (`variables`). A new task is
a function of a random generator and a row of `TASKS`. `retrieval.py` puts them
into texts.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FILLER = (
  'The grass is green. The sky is blue. The sun is yellow. '
  'Here we go. There and back again. '
)
COLOURS = (
  'amber', 'black', 'brown', 'coral', 'gold', 'grey', 'ivory', 'olive', 'pink',
  'plum', 'red', 'rose', 'silver', 'teal', 'violet', 'white',
)  # fmt: skip
NAMES = tuple('abcdefghijkmnpqrstuvwxyz')


class Puzzle(NamedTuple):
  """Sentences hidden in a text, and the question and answer at its end.

  Attributes:
    needles: Sentences. The first one stands at the depth that is asked for,
      the others anywhere; where `ordered`, all stand anywhere in their order.
    question: The text's end, up to the answer.
    answer: With the blank before it.
    ordered: Whether later needles build on earlier ones.
  """

  needles: tuple[str, ...]
  question: str
  answer: str
  ordered: bool = False


def _number(rng: np.random.Generator) -> int:
  return int(rng.integers(10_000, 100_000))


def one_needle(rng: np.random.Generator) -> Puzzle:
  """One number in the whole text."""
  key = _number(rng)
  return Puzzle(
    (f'The pass key is {key}. Remember it. ',),
    'What is the pass key? The pass key is',
    f' {key}',
  )


def several_keys(rng: np.random.Generator) -> Puzzle:
  """Four numbers of four colours, one of which is asked for."""
  colours = rng.choice(COLOURS, 4, replace=False)
  keys = [_number(rng) for _ in colours]
  return Puzzle(
    tuple(
      f'The {colour} key is {key}. '
      for colour, key in zip(colours, keys, strict=True)
    ),
    f'What is the {colours[0]} key? The {colours[0]} key is',
    f' {keys[0]}',
  )


def chained_variables(rng: np.random.Generator) -> Puzzle:
  """Two chains of three names; the number at the start of one is asked for."""
  names = rng.choice(NAMES, 6, replace=False)
  keys = [_number(rng) for _ in range(2)]
  chains = [
    (f'Let {a} be {key}. ', f'Let {b} be {a}. ', f'Let {c} be {b}. ')
    for (a, b, c), key in zip(names.reshape(2, 3), keys, strict=True)
  ]
  # The chains take turns at random, each in its own order.
  turns = rng.permutation([0, 0, 0, 1, 1, 1])
  lines = [iter(chain) for chain in chains]
  last = names[2]
  return Puzzle(
    tuple(next(lines[turn]) for turn in turns),
    f'What is {last}? The number {last} is',
    f' {keys[0]}',
    ordered=True,
  )


TASKS: dict[str, Callable[[np.random.Generator], Puzzle]] = {
  'needle': one_needle,
  'keys': several_keys,
  'variables': chained_variables,
}
