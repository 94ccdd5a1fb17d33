"""A byte-level BPE tokenizer made from a sample of a corpus."""

import json
import logging
from collections.abc import Iterator

from gated_jax.data import corpus
from gated_jax.paths import Path

_LOG = logging.getLogger(__name__)
# Characters to learn from. More hardly changes a vocabulary, and costs memory.
_SAMPLE = 100_000_000
_END = '<|endoftext|>'


def train_tokenizer(texts: Iterator[str], vocab: int, folder: Path) -> None:
  """Writes `tokenizer.json`, and beside it which token ends a document.

  Any text can be encoded, since every byte is a token of its own.

  Args:
    texts: of documents; as many are read as a sample needs.
    vocab: tokens, with 256 for the bytes and one for the end of a document.
    folder: where both files go.
  """
  if not 257 < vocab < 2**31:
    raise ValueError(
      f'--train-tokenizer={vocab} must be more than 257: 256 bytes and the end '
      'of a document are tokens already'
    )
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers
  from tokenizers import trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=[_END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_first(texts), trainer)
  size = tokenizer.get_vocab_size()
  if size < vocab:
    _LOG.warning(
      'the text gives only %d of %d tokens for the vocabulary', size, vocab
    )
  ends = {'bos_token': None, 'eos_token': _END, 'add_bos_token': False}
  corpus.write(folder / corpus.TOKENIZER_CONFIG, json.dumps(ends).encode())
  # Last, since whoever finds it takes the other for granted.
  corpus.write(folder / 'tokenizer.json', tokenizer.to_str().encode())


def _first(texts: Iterator[str]) -> Iterator[str]:
  """Texts up to the sample's size, the last one cut."""
  left = _SAMPLE
  for text in texts:
    yield text[:left]
    left -= len(text)
    if left <= 0:
      return
