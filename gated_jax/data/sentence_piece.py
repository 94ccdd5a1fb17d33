"""SentencePiece models, read with the package that wrote them.

Read `gated_jax/data/tokenizer_files.py` first, which has the other kind of file
and what both follow.
"""

from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32

from gated_jax.data.encode import Encoded
from gated_jax.data.encode import lay_out
from gated_jax.data.text_stream import PieceStream
from gated_jax.data.text_stream import TextStream
from gated_jax.data.tokenizer_files import Ends
from gated_jax.data.tokenizer_files import Spans
from gated_jax.data.tokenizer_files import piece_bytes
from gated_jax.data.tokenizer_files import stated
from gated_jax.data.tokenizer_files import without_gaps
from gated_jax.paths import Path
from gated_jax.paths import read_bytes


class SentencePieceTokenizer:
  """A `*.model`, read with the package `sentencepiece`."""

  def __init__(self, path: Path):
    try:
      import sentencepiece
    except ImportError as error:
      raise ImportError(
        f'{path} needs the package sentencepiece: pip install gated_jax[hf]'
      ) from error
    content = read_bytes(path)
    try:
      if not content:  # the package would take it for no model at all
        raise ValueError('it is empty')
      self._processor = sentencepiece.SentencePieceProcessor(
        model_proto=content
      )
    except (OSError, RuntimeError, ValueError) as error:
      raise ValueError(f'{path} is no SentencePiece model: {error}') from error
    self.name = str(path)
    self.vocab = self._processor.vocab_size()
    bos, says = self._processor.bos_id(), stated(path.parent)
    put_before = None
    if says is not None and 'bos_token' in says:
      put_before = says['bos_token'] is not None
    if says is not None and isinstance(says.get('add_bos_token'), bool):
      put_before = says['add_bos_token']
    ends = Ends.of(bos, self._processor.eos_id(), put_before)
    self.bos, self.eos, self.start = ends
    self._no_text = set(ends)

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """See `Tokenizer`."""
    return np.asarray(self._processor.encode(text), np.int32)

  def encode_batch(
    self, texts: Sequence[str], ends: tuple[int, int]
  ) -> Encoded:
    """See `Tokenizer`."""
    rows = self._processor.encode(list(texts), num_threads=1, out_type='numpy')
    return lay_out(rows, texts, ends)

  def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
    """See `Tokenizer`."""
    rows = []
    for text in texts:
      found = self._processor.encode(text, out_type='offset_mapping')
      begins, ends = np.array(found['offsets'], np.int64).reshape(-1, 2).T
      rows.append(without_gaps(found['ids'], begins, ends))
    return rows

  def spelling(self, i: int) -> str:
    """See `Tokenizer`; a model never reads its control pieces from text."""
    del i
    return ''

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer`."""
    return self._processor.decode([int(i) for i in ids if self._is_text(i)])

  def _is_text(self, i: int) -> bool:
    return 0 <= i < self.vocab and i not in self._no_text

  def stream(self, before: Iterable[int] = ()) -> TextStream:
    """See `Tokenizer`."""
    return PieceStream(self.decode, self._is_text, lambda _: False, before)

  def known(self) -> Bool[np.ndarray, ' V']:
    """See `Tokenizer`."""
    return np.array(
      [not self._processor.is_unused(i) for i in range(self.vocab)]
    )

  def special_in(self, text: str) -> list[str]:
    """See `Tokenizer`; a model never reads its control pieces from text."""
    del text
    return []

  def byte_lengths(self) -> Int32[np.ndarray, ' V']:
    """See `Tokenizer`."""
    lengths = np.zeros(self.vocab, np.int32)
    for i in range(self.vocab):
      if not (self._processor.is_control(i) or self._processor.is_unknown(i)):
        lengths[i] = piece_bytes(self._processor.id_to_piece(i))
    return lengths
