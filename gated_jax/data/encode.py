"""Ids of several documents, laid end to end in one array.

An array for each document costs a microsecond at every stage, as much as a
thousand bytes of its text, so documents travel together. Read
`gated_jax/data/tokenizer.py` for what makes them, `gated_jax/data/documents.py`
next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64


class Encoded(NamedTuple):
  """Ids of several documents one after the other, and how many each has."""

  ids: Int32[np.ndarray, ' T']
  lengths: Int64[np.ndarray, ' N']
  counts: Bool[np.ndarray, ' T'] | None = None  # see `Chunk`


def lay_out(
  rows: Sequence[Int32[np.ndarray, ' _']],
  texts: Sequence[str],
  ends: tuple[int, int],
) -> Encoded:
  """Documents between their two ends; one without text has no ids at all.

  Args:
    rows: ids of each text.
    texts: of the documents.
    ends: ids that open and close a document; -1: none.
  """
  around = [np.array([i][: i >= 0], np.int32) for i in ends]
  added = sum(map(len, around))
  has_text = np.fromiter(map(bool, texts), bool, len(texts))
  lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + added
  opening, closing = around
  parts: list[np.ndarray] = []
  for ids, text in zip(rows, texts, strict=True):
    if text:
      parts += (opening, ids, closing)
  joined = np.concatenate(parts) if parts else np.empty(0, np.int32)
  return Encoded(joined, lengths * has_text)
