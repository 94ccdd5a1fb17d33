"""Text to token ids and back: bytes, Hugging Face files, SentencePiece.

A document is laid out as `[bos] text [eos]`. Files of a released model say
whether a token stands before a text, and that is followed. Where nothing is
said, the layout is our own: the first character of a document is predicted as
well, from a token for the beginning or, in a vocabulary without one, from the
end-of-document token.

Read `gated_jax/data/tokenizer_files.py` and `gated_jax/data/sentence_piece.py`
for the two kinds of files, `gated_jax/data/documents.py` next.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Protocol
from typing import runtime_checkable

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32

from gated_jax.data.encode import Encoded
from gated_jax.data.sentence_piece import SentencePieceTokenizer
from gated_jax.data.text_stream import ByteStream
from gated_jax.data.text_stream import TextStream
from gated_jax.data.tokenizer_files import HuggingFaceTokenizer
from gated_jax.data.tokenizer_files import Spans
from gated_jax.paths import check_bucket
from gated_jax.paths import expand
from gated_jax.paths import is_file
from gated_jax.paths import is_folder
from gated_jax.paths import read_bytes


@runtime_checkable
class Tokenizer(Protocol):
  """The interface that pipeline, sampler and evaluations use.

  Attributes:
    name: 'bytes', or the path of its file.
    vocab: The largest id plus one.
    bos: Id before every document and prompt; -1: nothing stands there.
    eos: Id that closes a document; -1: none.
    start: Id to predict a first token from where no text stands before it,
      also where `bos` is -1; -1: the vocabulary has none.
  """

  name: str
  vocab: int
  bos: int
  eos: int
  start: int

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """Ids of `text` alone, without the ends of a document."""

  def encode_batch(
    self, texts: Sequence[str], ends: tuple[int, int]
  ) -> Encoded:
    """`encode` of each text, between the two ends of a document.

    It is done outside Python's lock where it can, so that several threads
    encode while others read. An empty text has no ids, not even for its ends.
    """

  def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
    """Ids of each text, with the characters that each token stands for."""

  def spelling(self, i: int) -> str:
    """Text that becomes this id where special tokens are read; '': none."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids`, without the ends of a document."""

  def stream(self, before: Iterable[int] = ()) -> TextStream:
    """Returns a decoder for ids that come one by one after those `before`."""

  def known(self) -> Bool[np.ndarray, ' V']:
    """Which ids below `vocab` are tokens: a vocabulary may have gaps."""

  def special_in(self, text: str) -> list[str]:
    """Special tokens whose spelling occurs in `text`."""

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    """UTF-8 bytes per token, 0 for special ones: for bits per byte.

    A space that SentencePiece puts before the text is counted.
    """


def make_tokenizer(name: str, special_tokens: bool = False) -> Tokenizer:
  """Returns the tokenizer called 'bytes', or the one in the file `name`.

  Args:
    name: 'bytes'; a SentencePiece `*.model` or a Hugging Face
      `tokenizer.json`; or the folder that holds one of these.
    special_tokens: Whether text that spells a special token becomes that
      token. By default it stays text: otherwise any document could end
      itself, or pretend to be another speaker.

  Raises:
    ValueError: `name` is none of these, or the file cannot be read as what its
      name says it is.
    ImportError: the package that reads it is not installed.
  """
  path = expand(name)
  if name != 'bytes':
    check_bucket(path)
    inside = (path / 'tokenizer.json', path / 'tokenizer.model')
    if is_folder(path):
      path = next((p for p in inside if is_file(p)), path)
  if name != 'bytes' and not is_file(path):
    raise ValueError(
      f"tokenizer {name!r} is neither 'bytes' nor a tokenizer.json or *.model "
      'file'
    )
  if path.suffix == '.json':
    return HuggingFaceTokenizer(path, special_tokens)
  if name != 'bytes' and path.suffix != '.model':
    raise ValueError(f'tokenizer {name!r} must end in .json or .model')
  if special_tokens:
    raise ValueError(
      f'special_tokens=True does nothing with tokenizer {name!r}, which never '
      'reads a special token from text'
    )
  return ByteTokenizer() if name == 'bytes' else SentencePieceTokenizer(path)


def ends_of(tokenizer: Tokenizer, end_to_end: bool) -> tuple[int, int]:
  """Ids that open and close a document; -1: none.

  Args:
    tokenizer: says which ones its vocabulary has.
    end_to_end: documents stand one after the other. Where one token serves
      both ends, the one that closes a document then opens the next.
  """
  shared = end_to_end and tokenizer.bos == tokenizer.eos
  return -1 if shared else tokenizer.bos, tokenizer.eos


def digest_of(tokenizer: Tokenizer) -> str:
  """A number that tells tokenizers apart, whatever their files are called."""
  if tokenizer.name == 'bytes':
    return 'bytes'
  return hashlib.sha256(read_bytes(expand(tokenizer.name))).hexdigest()


def document(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, ' T']:
  """Ids of a whole document: its text between its two ends."""
  ids = tokenizer.encode(text)
  ends = (tokenizer.bos >= 0, tokenizer.eos >= 0)
  out = np.empty(len(ids) + sum(ends), np.int32)
  out[ends[0] : ends[0] + len(ids)] = ids
  if ends[0]:
    out[0] = tokenizer.bos
  if ends[1]:
    out[-1] = tokenizer.eos
  return out


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255; 256 opens and closes a document."""

  name = 'bytes'
  vocab = 257
  bos = 256
  eos = 256
  start = 256

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """See `Tokenizer`."""
    raw = text.encode('utf-8', errors='surrogatepass')
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def encode_batch(
    self, texts: Sequence[str], ends: tuple[int, int]
  ) -> Encoded:
    """See `Tokenizer`."""
    raw = [t.encode('utf-8', errors='surrogatepass') for t in texts if t]
    # No UTF-8 has this byte, so it can stand for the ends until all of the
    # bytes are ids.
    opening, closing = (b'\xff' * (i >= 0) for i in ends)
    between = closing + opening
    joined = (opening + between.join(raw) + closing) if raw else b''
    ids = np.frombuffer(joined, np.uint8).astype(np.int32)
    lengths = np.fromiter(map(len, raw), np.int64, len(raw)) + len(between)
    after = np.cumsum(lengths)
    if opening:
      ids[after - lengths] = ends[0]
    if closing:
      ids[after - 1] = ends[1]
    has_text = np.fromiter(map(bool, texts), bool, len(texts))
    of_all = np.zeros(len(texts), np.int64)
    of_all[has_text] = lengths
    return Encoded(ids, of_all)

  def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
    """See `Tokenizer`."""
    rows = []
    for text in texts:
      sizes = [len(c.encode('utf-8', errors='surrogatepass')) for c in text]
      begins = np.repeat(np.arange(len(text)), sizes)
      rows.append(Spans(self.encode(text), begins, begins + 1))
    return rows

  def spelling(self, i: int) -> str:
    """See `Tokenizer`; no text spells the end of a document."""
    del i
    return ''

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer`."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    text = ids[(ids >= 0) & (ids < 256)].astype(np.uint8)
    return text.tobytes().decode('utf-8', errors='replace')

  def stream(self, before: Iterable[int] = ()) -> TextStream:
    """See `Tokenizer`."""
    return ByteStream(before)

  def known(self) -> Bool[np.ndarray, ' V']:
    """See `Tokenizer`."""
    return np.ones(self.vocab, bool)

  def special_in(self, text: str) -> list[str]:
    """See `Tokenizer`; no text spells the end of a document."""
    del text
    return []

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    """See `Tokenizer`."""
    lengths = np.ones(self.vocab, np.int32)
    lengths[self.eos] = 0
    return lengths
