"""Tokenizers in Hugging Face's `tokenizer.json`, and what other files share.

They are read with the package that wrote them. What a model's authors say in
the `tokenizer_config.json` beside a file is followed: which tokens open and
close a text, and whether one is put before it at all. SentencePiece models are
`gated_jax/data/sentence_piece.py`'s.
"""

import json
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import Int64

from gated_jax.data.encode import Encoded
from gated_jax.data.encode import lay_out
from gated_jax.data.text_stream import PieceStream
from gated_jax.data.text_stream import TextStream
from gated_jax.data.text_stream import unsettled_pieces
from gated_jax.paths import Path
from gated_jax.paths import is_file
from gated_jax.paths import read_bytes

# Names that vocabularies give to the two ends of a document, likeliest first;
# read only where tokenizer_config.json does not say.
_BOS_NAMES = ('<s>', '<bos>', '<|begin_of_text|>', '[CLS]')
_EOS_NAMES = ('<|endoftext|>', '</s>', '<eos>', '<|end_of_text|>', '[SEP]')
_CONFIG = 'tokenizer_config.json'


class Ends(NamedTuple):
  """Ids around a text; -1: none. See `Tokenizer` for what each is for."""

  bos: int
  eos: int
  start: int

  @staticmethod
  def of(bos: int, eos: int, put_before: bool | None) -> 'Ends':
    """Chooses them by the vocabulary and by what its authors say.

    Args:
      bos: For the beginning of a text; -1: the vocabulary has none.
      eos: For its end; -1: none.
      put_before: Whether the first stands before every text; None: nothing
        is said, so that our own layout takes what there is.
    """
    start = eos if bos < 0 else bos
    if put_before is None:
      return Ends(start, eos, start)
    return Ends(bos if put_before else -1, eos, start)


class Spans(NamedTuple):
  """Ids of a text, and the characters that each of them stands for."""

  ids: Int32[np.ndarray, ' T']
  begins: Int64[np.ndarray, ' T']
  ends: Int64[np.ndarray, ' T']  # a character may be several tokens' own


def without_gaps(
  ids: Sequence[int],
  begins: Int64[np.ndarray, ' T'],
  ends: Int64[np.ndarray, ' T'],
) -> Spans:
  """Spans that leave no character out.

  Packages trim spaces off the spans of tokens that hold them.
  """
  before = np.zeros_like(ends)
  np.maximum.accumulate(ends[:-1], out=before[1:])
  return Spans(np.asarray(ids, np.int32), np.minimum(begins, before), ends)


def stated(folder: Path) -> dict[str, Any] | None:
  """The contents of tokenizer_config.json; None where there is none."""
  path = folder / _CONFIG
  if not is_file(path):
    return None
  try:
    values = json.loads(read_bytes(path))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds no object')
  asked = values.get('add_bos_token')
  if not isinstance(asked, bool | None):
    raise ValueError(f'{path}: add_bos_token={asked!r} must be true or false')
  if asked and 'bos_token' in values and values['bos_token'] is None:
    raise ValueError(f'{path} has add_bos_token=true and no bos_token')
  return values


def spelled(token: Any) -> str:
  """The spelling of a token that a config names; '' for null."""
  if isinstance(token, dict):
    token = token.get('content')
  return token if isinstance(token, str) else ''


class HuggingFaceTokenizer:
  """A `tokenizer.json`, read with the package `tokenizers`.

  Args:
    path: The file.
    special_tokens: Whether text that spells a special token becomes it.
  """

  def __init__(self, path: Path, special_tokens: bool = False):
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        f'{path} needs the package tokenizers: pip install gated_jax[hf]'
      ) from error
    # Threads that call the package would wait for each other's threads in it,
    # and use half as much time again. Users can set it otherwise.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    content = read_bytes(path)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises bare Exception
      raise ValueError(f'{path} is no tokenizer.json: {error}') from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = not special_tokens
    self._reads_special = special_tokens
    self.name = str(path)
    tokens = self._tokenizer.get_vocab(with_added_tokens=True)
    self._pieces = {i: piece for piece, i in tokens.items()}
    self._added = self._tokenizer.get_added_tokens_decoder()
    self._special = {i for i, token in self._added.items() if token.special}
    self.vocab = max(tokens.values(), default=-1) + 1
    self._layout = json.loads(self._tokenizer.to_str())
    ends = self._find_ends(path.parent, tokens)
    self.bos, self.eos, self.start = ends
    self._no_text = set(ends)
    self._unsettled = self._find_unsettled()
    self._spellable = self._find_spellable()

  def _find_ends(self, folder: Path, tokens: dict[str, int]) -> Ends:
    says = stated(folder)

    def find(key: str, names: tuple[str, ...]) -> int:
      """The id of a stated token, else of the first name known; or -1."""
      if says and key in says:
        return tokens.get(spelled(says[key]), -1)
      return next((tokens[name] for name in names if name in tokens), -1)

    bos = find('bos_token', _BOS_NAMES)
    eos = find('eos_token', _EOS_NAMES)
    around = self._tokenizer.encode('', add_special_tokens=True).ids
    puts = bool(around) and around[0] == bos
    put_before: bool | None = True if puts else None
    if says is not None:
      asked = says.get('add_bos_token')
      put_before = puts if asked is None else asked
    return Ends.of(bos, eos, put_before)

  def _find_unsettled(self) -> Callable[[int], bool]:
    """Tells which ids a stream returns only with the ids after them."""
    kind = unsettled_pieces(self._layout['decoder'])
    if kind == 'all':
      return lambda _: True
    if kind == 'none':
      return lambda _: False
    return lambda i: is_byte(self._pieces[i])

  def _find_spellable(self) -> Bool[np.ndarray, ' V']:
    """Marks special tokens, but not the one that stands for unknown text."""
    model = self._layout['model']
    unknown = {model.get('unk_id')}
    if model.get('unk_token'):
      unknown.add(self._tokenizer.token_to_id(model['unk_token']))
    return np.isin(np.arange(self.vocab), list(self._special - unknown))

  def encode_batch(
    self, texts: Sequence[str], ends: tuple[int, int]
  ) -> Encoded:
    """See `Tokenizer`."""
    # The package holds Python's lock for single texts, and not for a batch.
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
    if not self._reads_special:
      for place, ids in enumerate(rows):
        if self._spellable[ids].any():
          rows[place] = self.encode(texts[place])
    return lay_out(rows, texts, ends)

  def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
    """See `Tokenizer`."""
    encodings = self._tokenizer.encode_batch(
      list(texts), add_special_tokens=False
    )
    rows = []
    for encoding in encodings:
      spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
      rows.append(without_gaps(encoding.ids, spans[:, 0], spans[:, 1]))
    return rows

  def spelling(self, i: int) -> str:
    """See `Tokenizer`."""
    return self._pieces[i] if i in self._special else ''

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """See `Tokenizer`."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    cuts = [] if self._reads_special else self._spelled(encoding)
    if not cuts:
      return np.asarray(encoding.ids, np.int32)
    parts = zip([0, *cuts], [*cuts, len(text)], strict=True)
    return np.concatenate([self.encode(text[a:b]) for a, b in parts])

  def _spelled(self, encoding: Any) -> list[int]:
    """Returns where to cut a text so that it spells no special token.

    Some models have their special tokens among their ordinary pieces too, and
    match them there whatever the package is told. A spelling cut after its
    first character matches neither; at worst it
    gains a space there.
    """
    return [
      begin + 1
      for i, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
      if self._spellable[i] and end - begin > 1
    ]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer`."""
    text = [int(i) for i in ids if i not in self._no_text]
    return self._tokenizer.decode(text, skip_special_tokens=False)

  def stream(self, before: Iterable[int] = ()) -> TextStream:
    """See `Tokenizer`."""

    def is_text(i: int) -> bool:
      """Tells whether the id stands for text."""
      return i in self._pieces and i not in self._no_text

    return PieceStream(self.decode, is_text, self._unsettled, before)

  def known(self) -> Bool[np.ndarray, ' V']:
    """See `Tokenizer`."""
    return np.isin(np.arange(self.vocab), list(self._pieces))

  def special_in(self, text: str) -> list[str]:
    """See `Tokenizer`."""
    spellings = sorted(self._pieces[i] for i in self._special)
    return [piece for piece in spellings if piece in text]

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    """See `Tokenizer`."""
    # A byte-level vocabulary writes each byte as one character.
    parts = json.dumps([self._layout['decoder'], self._layout['pre_tokenizer']])
    byte_level = '"ByteLevel"' in parts
    lengths = np.zeros(self.vocab, np.int32)
    for i, piece in self._pieces.items():
      if i in self._special or i in self._no_text:
        continue
      if byte_level and i not in self._added:
        lengths[i] = len(piece)
      else:
        lengths[i] = piece_bytes(piece)
    return lengths


def is_byte(piece: str) -> bool:
  """Tells whether a piece stands for one byte, as <0xNN>."""
  return len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>')


def piece_bytes(piece: str) -> int:
  """Bytes of a piece that writes a space as U+2581 and a byte as <0xNN>."""
  if is_byte(piece):
    return 1
  return len(piece.replace('\u2581', ' ').encode('utf-8', 'surrogatepass'))
