"""Documents of text that are longer than one should be, in several pieces.

A piece ends at the end of a line where it can, and never inside a character.
Each piece counts as a document of its own from here on.
"""

from collections.abc import Callable
from collections.abc import Iterator

from gated_jax.data.sources import Document
from gated_jax.data.sources import Unit

# A cursor inside a record: the place before it, and how many of its pieces
# were read times this. No file has so many bytes or records.
_PIECE = 1 << 48

Reader = Callable[[Unit, int], Iterator[tuple[int, Document]]]


def inside_a_document(cursor: int) -> bool:
  """Tells whether a cursor lies between two pieces of a document."""
  return cursor >= _PIECE


def may_be_long(text: str, longest: int) -> bool:
  """Tells whether a text can have more than `longest` bytes."""
  return len(text) * 4 > longest  # no character has more


def cut_long(
  records: Reader, unit: Unit, cursor: int, longest: int
) -> Iterator[tuple[int, Document]]:
  """Yields pieces of at most `longest` bytes, from any of them on.

  Args:
    records: reads whole documents from a place between two of them on.
    unit: what it reads.
    cursor: from an earlier call; 0: the beginning.
    longest: bytes of a piece, more only where one character has more.
  """
  done, before = divmod(cursor, _PIECE)
  for after, document in records(unit, before):
    raw = b''
    if may_be_long(document.text, longest):
      raw = document.text.encode('utf-8', errors='surrogatepass')
    if len(raw) <= longest:
      yield after, document
    else:
      ends = list(_ends(raw, longest))
      for number, end in enumerate(ends[done:], done + 1):
        begin = ends[number - 2] if number > 1 else 0
        text = raw[begin:end].decode('utf-8', errors='surrogatepass')
        place = after if end == len(raw) else before + number * _PIECE
        yield place, document._replace(text=text)
    before, done = after, 0


def _ends(raw: bytes, longest: int) -> Iterator[int]:
  end = 0
  while end < len(raw):
    end = piece_end(raw, end, longest)
    yield end


def piece_end(raw: bytes, begin: int, size: int) -> int:
  """The end of a document of at most `size` bytes from `begin` on."""
  if len(raw) - begin <= size:
    return len(raw)
  line = raw.rfind(b'\n', begin, begin + size)
  if line >= 0:
    return line + 1
  end = begin + size
  while end > begin and raw[end] & 0xC0 == 0x80:
    end -= 1  # not inside a character
  if end > begin:
    return end
  end = begin + 1
  while end < len(raw) and raw[end] & 0xC0 == 0x80:
    end += 1
  return end
