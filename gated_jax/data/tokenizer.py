"""Text to token ids and back: bytes, Hugging Face files, SentencePiece.

A document is laid out as `[bos] text [eos]`, so that its first character is
predicted as well and an empty prompt has a token to start from. Where a
vocabulary has no token for the beginning, the end-of-document token serves
both ends; where it has neither, the text stands alone.

Read `gated_jax/data/documents.py` next.
"""

import codecs
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol
from typing import runtime_checkable

import numpy as np
from jaxtyping import Int32

# Names that vocabularies give to the two ends of a document, likeliest first;
# read only where tokenizer_config.json does not say.
_BOS_NAMES = ('<s>', '<bos>', '<|begin_of_text|>', '[CLS]')
_EOS_NAMES = ('<|endoftext|>', '</s>', '<eos>', '<|end_of_text|>', '[SEP]')


@runtime_checkable
class TextStream(Protocol):
  """Turns ids into text as they come, holding back half characters."""

  def feed(self, token: int) -> str:
    """Returns the text that `token` completes, often but not always some."""

  def finish(self) -> str:
    """Returns what is left; a half character becomes U+FFFD."""


@runtime_checkable
class Tokenizer(Protocol):
  """What the pipeline and the sampler need of a tokenizer.

  `bos` and `eos` are the ids that open and close a document; -1: none.
  """

  name: str
  vocab: int
  bos: int
  eos: int

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """Ids of `text` alone, without the ends of a document."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids`, without the ends of a document."""

  def stream(self) -> TextStream:
    """Returns a decoder for ids that come one by one."""

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    """UTF-8 bytes per token, 0 for special ones: for bits per byte.

    A space that SentencePiece puts before the text is counted.
    """


def make_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer called 'bytes', or the one in the file `name`.

  A file is either a SentencePiece `*.model` or a Hugging Face
  `tokenizer.json`, or the folder that holds one of these.

  Raises:
    ValueError: `name` is neither, or the file cannot be read as what its name
      says it is.
    ImportError: the package that reads it is not installed.
  """
  if name == 'bytes':
    return ByteTokenizer()
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    inside = (path / 'tokenizer.json', path / 'tokenizer.model')
    path = next((p for p in inside if p.is_file()), path)
  if not path.is_file():
    raise ValueError(
      f"tokenizer {name!r} is neither 'bytes' nor a tokenizer.json or *.model "
      'file'
    )
  if path.suffix == '.json':
    return HuggingFaceTokenizer(path)
  if path.suffix == '.model':
    return SentencePieceTokenizer(path)
  raise ValueError(f'tokenizer {name!r} must end in .json or .model')


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

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    raw = text.encode('utf-8', errors='surrogatepass')
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(ids, np.int64).reshape(-1)
    kept = ids[(ids >= 0) & (ids < 256)]
    return kept.astype(np.uint8).tobytes().decode('utf-8', errors='replace')

  def stream(self) -> TextStream:
    return _ByteStream()

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    lengths = np.ones(self.vocab, np.int32)
    lengths[self.eos] = 0
    return lengths


class _ByteStream:
  def __init__(self):
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def feed(self, token: int) -> str:
    if not 0 <= token < 256:
      return ''
    return self._decoder.decode(bytes((token,)))

  def finish(self) -> str:
    return self._decoder.decode(b'', final=True)


class _PieceStream:
  """Decodes the last few ids together, since pieces change with neighbours."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._told = 0  # characters of the decoded ids already returned
    self._context = 0  # ids kept only because the next ones lean on them

  def feed(self, token: int) -> str:
    self._ids.append(int(token))
    text = self._tokenizer.decode(self._ids)
    if text.endswith('\ufffd'):
      return ''
    new = text[self._told :]
    if new:
      self._ids = self._ids[self._context :]
      self._context = len(self._ids)
      self._told = len(self._tokenizer.decode(self._ids))
    return new

  def finish(self) -> str:
    new = self._tokenizer.decode(self._ids)[self._told :]
    self._ids, self._told, self._context = [], 0, 0
    return new


class HuggingFaceTokenizer:
  """A `tokenizer.json`, read with the package `tokenizers`."""

  def __init__(self, path: pathlib.Path):
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f'{path} needs the package tokenizers: pip install gated_jax[hf]'
      ) from error
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
      raise ValueError(f'{path} is no tokenizer.json: {error}') from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.name = str(path)
    tokens = self._tokenizer.get_vocab(with_added_tokens=True)
    self._pieces = {i: piece for piece, i in tokens.items()}
    self._special = {
      i
      for i, token in self._tokenizer.get_added_tokens_decoder().items()
      if token.special
    }
    self.vocab = max(tokens.values(), default=-1) + 1
    self.bos, self.eos = self._find_ends(path.parent, tokens)

  def _find_ends(
    self, folder: pathlib.Path, tokens: dict[str, int]
  ) -> tuple[int, int]:
    """Returns bos and eos as tokenizer_config.json beside it says."""
    said = {}
    beside = folder / 'tokenizer_config.json'
    if beside.is_file():
      try:
        loaded = json.loads(beside.read_text(encoding='utf-8'))
        said = loaded if isinstance(loaded, dict) else {}
      except ValueError as error:
        raise ValueError(f'{beside} is not JSON: {error}') from error

    def find(key: str, names: tuple[str, ...]) -> int:
      if key in said:
        token = said[key]
        content = token.get('content') if isinstance(token, dict) else token
        return tokens.get(content or '', -1)
      return next((tokens[name] for name in names if name in tokens), -1)

    eos = find('eos_token', _EOS_NAMES)
    bos = find('bos_token', _BOS_NAMES)
    return (eos if bos < 0 else bos), eos

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    kept = [int(i) for i in ids if i not in (self.bos, self.eos)]
    return self._tokenizer.decode(kept, skip_special_tokens=False)

  def stream(self) -> TextStream:
    return _PieceStream(self)

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    # A byte-level vocabulary writes each byte as one character.
    layout = json.loads(self._tokenizer.to_str())
    parts = json.dumps([layout['decoder'], layout['pre_tokenizer']])
    byte_level = '"ByteLevel"' in parts
    added = self._tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(self.vocab, np.int32)
    for i, piece in self._pieces.items():
      if i in self._special or i in (self.bos, self.eos):
        continue
      if byte_level and i not in added:
        lengths[i] = len(piece)
      else:
        lengths[i] = _piece_bytes(piece)
    return lengths


class SentencePieceTokenizer:
  """A `*.model`, read with the package `sentencepiece`."""

  def __init__(self, path: pathlib.Path):
    try:
      import sentencepiece
    except ImportError as error:
      raise ImportError(
        f'{path} needs the package sentencepiece: pip install gated_jax[hf]'
      ) from error
    try:
      self._processor = sentencepiece.SentencePieceProcessor(
        model_file=str(path)
      )
    except (OSError, RuntimeError, ValueError) as error:
      raise ValueError(f'{path} is no SentencePiece model: {error}') from error
    self.name = str(path)
    self.vocab = self._processor.vocab_size()
    self.eos = self._processor.eos_id()
    bos = self._processor.bos_id()
    self.bos = self.eos if bos < 0 else bos

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return np.asarray(self._processor.encode(text), np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    kept = [int(i) for i in ids if i not in (self.bos, self.eos)]
    return self._processor.decode(kept)

  def stream(self) -> TextStream:
    return _PieceStream(self)

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    lengths = np.zeros(self.vocab, np.int32)
    for i in range(self.vocab):
      if not (self._processor.is_control(i) or self._processor.is_unknown(i)):
        lengths[i] = _piece_bytes(self._processor.id_to_piece(i))
    return lengths


def _piece_bytes(piece: str) -> int:
  """Bytes of a piece that writes a space as U+2581 and a byte as <0xNN>."""
  if len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>'):
    return 1
  return len(piece.replace('\u2581', ' ').encode('utf-8', 'surrogatepass'))
