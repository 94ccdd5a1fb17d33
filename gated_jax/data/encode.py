"""Texts of documents to token ids, many at a time.

The packages that tokenise do so outside Python's lock when they are given
several texts at once, so blocks of documents can be encoded in threads while
other documents are read. Read `gated_jax/data/tokenizer.py` for the tokenizers,
`gated_jax/data/documents.py` next.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64

from gated_jax.data.tokenizer import Tokenizer
from gated_jax.paths import expand
from gated_jax.paths import read_bytes


class Encoded(NamedTuple):
  """Ids of several documents one after the other, and how many each has."""

  ids: Int32[np.ndarray, ' T']
  lengths: Int64[np.ndarray, ' N']
  counts: Bool[np.ndarray, ' T'] | None = None  # see `Chunk`


def ends_of(tokenizer: Tokenizer, end_to_end: bool) -> tuple[int, int]:
  """Ids that open and close a document; -1: none.

  Args:
    tokenizer: says which ones its vocabulary has.
    end_to_end: documents stand one after the other. Where one token serves
      both ends, the one that closes a document then opens the next.
  """
  shared = end_to_end and tokenizer.bos == tokenizer.eos
  return -1 if shared else tokenizer.bos, tokenizer.eos


def encode(
  tokenizer: Tokenizer, texts: Sequence[str], ends: tuple[int, int]
) -> Encoded:
  """Whole documents; one without text has no ids at all.

  Args:
    tokenizer: is asked once for all of them.
    texts: of the documents.
    ends: from `ends_of`.
  """
  opening, closing = (np.array([i] if i >= 0 else [], np.int32) for i in ends)
  parts: list[np.ndarray] = []
  lengths = np.zeros(len(texts), np.int64)
  for place, ids in enumerate(tokenizer.encode_batch(texts)):
    if texts[place]:
      parts += (opening, ids, closing)
      lengths[place] = len(opening) + len(ids) + len(closing)
  joined = np.concatenate(parts) if parts else np.empty(0, np.int32)
  return Encoded(joined, lengths)


def digest_of(tokenizer: Tokenizer) -> str:
  """A number that tells tokenizers apart, whatever their files are called."""
  if tokenizer.name == 'bytes':
    return 'bytes'
  return hashlib.sha256(read_bytes(expand(tokenizer.name))).hexdigest()
