"""Token ids to text one by one: never half a character, never a lost space.

The text of a token depends on its neighbours. The first piece of a text loses
its leading space, a character may be spread over several tokens, and some
decoders read bytes only in whole runs. A stream therefore decodes each new
token together with a few before it, and returns only text that no later token
can change. What a stream returns adds up to what the tokenizer makes of all
ids at once.
"""

import codecs
import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Protocol
from typing import runtime_checkable

# Decoders write this in place of bytes that are no character (yet).
REPLACEMENT = '\ufffd'
# Decoders that make one string of all pieces; what follows them sees borders
# between pieces no longer.
_JOINING = ('Fuse', 'ByteLevel')
_BY_PIECE = (
  'BPEDecoder',
  'ByteFallback',
  'ByteLevel',
  'CTC',
  'Fuse',
  'Metaspace',
  'Replace',
  'Strip',
  'WordPiece',
)


@runtime_checkable
class TextStream(Protocol):
  """Turns ids into text as they come, holding back half characters."""

  def feed(self, token: int) -> str:
    """Returns the text that `token` completes, often but not always some."""

  def finish(self) -> str:
    """Returns what was held back; half a character becomes U+FFFD."""


class ByteStream:
  """The stream of a tokenizer whose ids 0 to 255 are UTF-8 bytes."""

  def __init__(self, before: Iterable[int] = ()):
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._shown = ''  # text held back here that the reader has already
    for token in before:
      self.feed(int(token))
    # The decoder holds half of a surrogate back as if a character could come.
    held: bytes = self._decoder.getstate()[0]
    self._shown = held.decode('utf-8', errors='replace')

  def feed(self, token: int) -> str:
    """See `TextStream`."""
    if not 0 <= token < 256:
      return ''
    return self._unseen(self._decoder.decode(bytes((token,))))

  def finish(self) -> str:
    """See `TextStream`."""
    return self._unseen(self._decoder.decode(b'', final=True))

  def _unseen(self, new: str) -> str:
    if not new:
      return new
    shown, self._shown = self._shown, ''
    return new.removeprefix(shown)


class PieceStream:
  """The stream of a tokenizer whose pieces change with their neighbours.

  Args:
    decode: Text of ids; it is called with a few of them at a time.
    is_text: Whether an id stands for text. The others are passed over.
    is_unsettled: Whether the text of an id may change with the ids after it
      by more than the completion of a character.
    before: Ids whose text the reader has already.
  """

  def __init__(
    self,
    decode: Callable[[Sequence[int]], str],
    is_text: Callable[[int], bool],
    is_unsettled: Callable[[int], bool],
    before: Iterable[int] = (),
  ):
    self._decode = decode
    self._is_text = is_text
    self._is_unsettled = is_unsettled
    self._ids: list[int] = []
    self._returned = 0  # characters of the decoded ids that were returned
    self._context = 0  # ids that stay only because the next one needs them
    self._shown = ''  # text held back here that the reader has already
    for token in before:
      self.feed(int(token))
    self._shown = self._decode(self._ids)[self._returned :]

  def feed(self, token: int) -> str:
    """See `TextStream`."""
    token = int(token)
    if not self._is_text(token):
      return ''
    self._ids.append(token)
    if self._is_unsettled(token):
      return ''
    text = self._decode(self._ids)
    # Replacement characters at the end may be half of a real one.
    settled = len(text.rstrip(REPLACEMENT))
    new = text[self._returned : settled]
    if not new:
      return ''
    self._returned = settled
    if settled == len(text):
      self._forget()
    return self._unseen(new)

  def finish(self) -> str:
    """See `TextStream`."""
    new = self._decode(self._ids)[self._returned :]
    self._ids, self._returned, self._context = [], 0, 0
    return self._unseen(new)

  def _forget(self) -> None:
    """Drops ids that later ones do not depend on.

    The first piece of a text is decoded in its own way, so at least one that
    is visible has to stay.
    """
    rest = self._ids[self._context :]
    text = self._decode(rest)
    if text:
      self._ids, self._context, self._returned = rest, len(rest), len(text)

  def _unseen(self, new: str) -> str:
    """The part of new text that the reader does not have."""
    shown, self._shown = self._shown, ''
    pairs = zip(shown, new, strict=False)
    return new[sum(1 for _ in itertools.takewhile(_equal, pairs)) :]


def _equal(pair: tuple[str, str]) -> bool:
  return pair[0] == pair[1]


def unsettled_pieces(decoder: Any) -> str:
  """Which pieces a decoder of the package `tokenizers` may change later.

  Args:
    decoder: The entry `decoder` of a tokenizer.json.

  Returns:
    'none'; 'bytes': a run of byte pieces, which is decoded as a whole; or
    'all': text may be replaced across the borders of pieces, so that nothing
    can be returned before the end.
  """
  unsettled, joined = 'none', False
  for part in _flat(decoder):
    kind = part.get('type')
    if kind not in _BY_PIECE or (joined and not _is_local(part)):
      return 'all'
    if kind == 'ByteFallback':
      unsettled = 'bytes'
    joined = joined or kind in _JOINING
  return unsettled


def _flat(decoder: Any) -> list[dict[str, Any]]:
  if not decoder:
    return []
  if decoder.get('type') != 'Sequence':
    return [decoder]
  return [part for inner in decoder['decoders'] for part in _flat(inner)]


def _is_local(part: dict[str, Any]) -> bool:
  """Tells whether a decoder changes joined text by the character only."""
  if part['type'] == 'Replace':
    return len(part['pattern'].get('String', '')) == 1
  return part['type'] in ('Fuse', 'Strip')
