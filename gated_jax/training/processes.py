"""What the processes of one run tell each other: JSON values, and failures."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(mine: Any) -> list[Any]:
  """The JSON values of all processes, in order; all of them call this."""
  if jax.process_count() == 1:
    return [mine]
  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.array(len(text))))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(text)] = text
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(bytes(row[:size]))
    for row, size in zip(rows, sizes.ravel(), strict=True)
  ]


def first_problem(mine: str) -> str:
  """The problem of the first process that has one; '' where none has.

  A process that failed alone would leave the others waiting for it: so all
  hear of it, and all do the same about it.
  """
  return next((text for text in gather(mine) if text), '')
