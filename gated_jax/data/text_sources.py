"""Documents of text: plain files and JSON lines, and the door to all of text.

Read `gated_jax/data/sources.py` first; Parquet and ArrayRecord are
`gated_jax/data/record_sources.py`'s.
"""

import pathlib
import sysconfig
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import BinaryIO

from gated_jax.data.array_record_source import ArrayRecordSource
from gated_jax.data.files import DataFiles
from gated_jax.data.files import find_files
from gated_jax.data.long_documents import cut_long
from gated_jax.data.long_documents import inside_a_document
from gated_jax.data.long_documents import may_be_long
from gated_jax.data.long_documents import piece_end
from gated_jax.data.record_sources import ParquetSource
from gated_jax.data.record_sources import json_text
from gated_jax.data.sources import Block
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.sources import Texts
from gated_jax.data.sources import Unit
from gated_jax.data.sources import byte_ranges
from gated_jax.data.sources import byte_units

_RANGE = 16 << 20  # bytes of a text or JSONL file that are one unit
_LINE = 64 << 10  # bytes behind a unit that its last line most likely ends in
_LINES = 1 << 18  # bytes of lines that are read at once
# Folders of the standard library that not every system installs, or that hold
# other people's packages.
_NOT_LIBRARY = frozenset(
  ('site-packages', 'dist-packages', 'test', 'tests', 'idle_test')
)


def stdlib_files() -> DataFiles:
  """The running interpreter's own modules, tests left out, in a fixed order.

  Raises:
    ValueError: they are not there as files (in a zip archive, for example).
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  files = [
    path
    for path in root.rglob('*.py')
    if not _NOT_LIBRARY.intersection(path.relative_to(root).parts[:-1])
    and path.stat().st_size
  ]
  if not files:
    raise ValueError(f'the standard library has no *.py files in {root}')
  return DataFiles(str(path) for path in sorted(files))


class Lines(Records):
  """Files of lines, of which a unit is a range of bytes."""

  def __init__(self, files: Sequence[str], skipped: Skipped):
    self.skipped = skipped
    self.files = DataFiles.of(files)
    self.units = byte_units(self.files, _RANGE, skipped)

  def expect(self, unit: Unit) -> None:
    """See `Source`."""
    self.files.expect(unit.path, *stretch(unit))


class TextSource(Lines):
  """UTF-8 files: one document each, or several where one is very long.

  A file longer than `max_document` bytes is cut at line ends. A file that is
  not UTF-8 is left out whole (one of more than 16 MiB: that part of it).
  """

  def __init__(self, files: Sequence[str], max_document: int, skipped: Skipped):
    super().__init__(files, skipped)
    self._max_document = max_document

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    raw = _whole_lines(self.files, unit)
    raw.decode('utf-8')  # all of it before any of it is used
    while cursor < len(raw):
      end = piece_end(raw, cursor, self._max_document)
      text = raw[cursor:end].decode('utf-8')
      cursor = end
      yield cursor, Document(text, None, unit.path)


class JsonLinesSource(Lines):
  """One JSON object per line, its text in the field `column`."""

  def __init__(
    self,
    files: Sequence[str],
    column: str,
    max_document: int,
    skipped: Skipped,
  ):
    super().__init__(files, skipped)
    self._column = column
    self._max_document = max_document

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    return cut_long(self._records, unit, cursor, self._max_document)

  def blocks(self, unit: Unit, cursor: int) -> Iterator[Block]:
    """See `Source`; many lines at once, up to one that has to be cut."""
    if inside_a_document(cursor):
      yield from super().blocks(unit, cursor)
      return
    for ends, texts in self._texts(unit, cursor):
      if may_be_long(max(texts, key=len, default=''), self._max_document):
        yield from super().blocks(unit, cursor)
        return
      if texts:
        yield Texts(ends, texts, [unit.path] * len(texts))
        cursor = ends[-1]

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    for ends, texts in self._texts(unit, cursor):
      for end, text in zip(ends, texts, strict=True):
        yield end, Document(text, None, unit.path)

  def _texts(
    self, unit: Unit, cursor: int
  ) -> Iterator[tuple[list[int], list[str]]]:
    """The places after blocks of documents, and what these say."""
    for place, lines in _line_blocks(self.files, unit, cursor):
      ends: list[int] = []
      texts: list[str] = []
      for line in lines:
        place += len(line)
        if line.isspace():
          continue
        try:
          texts.append(json_text(line, self._column))
        except ValueError as error:
          where = f'{unit.path} (line ending at byte {place})'
          self.skipped.add(where, error)
        else:
          ends.append(place)
      yield ends, texts


def ranges_of(files: DataFiles, path: str) -> list[Unit]:
  """The units of a file of lines."""
  return byte_ranges(files, path, _RANGE)


def stretch(unit: Unit) -> tuple[int, int]:
  """The bytes that are read of a unit: its lines, of which the last goes on."""
  return max(unit.begin - 1, 0), unit.end + _LINE


def _whole_lines(files: DataFiles, unit: Unit) -> bytes:
  """The lines that start inside the unit, in one piece."""
  with files.open(unit.path, *stretch(unit)) as file:
    _to_first_line(file, unit)
    begin = file.tell()
    if begin >= unit.end:
      return b''
    raw = file.read(unit.end - begin)
    _refuse_truncated(begin + len(raw), unit)
    return raw if raw.endswith(b'\n') else raw + file.readline()


def _to_first_line(file: BinaryIO, unit: Unit) -> None:
  """A line that starts before the unit belongs to the one before."""
  if unit.begin:
    file.seek(unit.begin - 1)
    file.readline()


def _refuse_truncated(place: int, unit: Unit) -> None:
  if place < unit.end:
    raise ValueError(
      f'truncated: {place} bytes, where {unit.end} were found at the start'
    )


def _line_blocks(
  files: DataFiles, unit: Unit, cursor: int
) -> Iterator[tuple[int, list[bytes]]]:
  """Lines that start inside the unit, with the place before the first."""
  with files.open(unit.path, *stretch(unit)) as file:
    if cursor:
      file.seek(cursor)
    else:
      _to_first_line(file, unit)
    place = file.tell()
    while place < unit.end:
      lines = file.readlines(min(_LINES, unit.end - place))
      if not lines:
        _refuse_truncated(place, unit)
      after = place + sum(map(len, lines))
      # Lines that fill the size exactly are followed by one more.
      if after - len(lines[-1]) >= unit.end:
        after -= len(lines.pop())
      yield place, lines
      place = after


def lines_of(
  files: DataFiles, unit: Unit, cursor: int
) -> Iterator[tuple[int, bytes]]:
  """Lines that start inside the unit, each with the place after it."""
  for place, lines in _line_blocks(files, unit, cursor):
    for line in lines:
      place += len(line)
      yield place, line


def make_text_source(
  kind: str, paths: str, column: str, max_document: int, skipped: Skipped
) -> Source:
  """The source that the word in `DataConfig.source` stands for."""
  files = stdlib_files() if kind == 'stdlib' else find_files(paths)
  return text_source(kind, files, column, max_document, skipped)


def text_source(
  kind: str,
  files: Sequence[str],
  column: str,
  max_document: int,
  skipped: Skipped,
) -> Source:
  """The same for files by name. Without any it has no units of its own, and
  reads those of another source of its kind."""
  if kind in ('stdlib', 'text'):
    return TextSource(files, max_document, skipped)
  table: dict[str, Callable[..., Source]] = {
    'jsonl': JsonLinesSource,
    'parquet': ParquetSource,
    'array_record': ArrayRecordSource,
  }
  return table[kind](files, column, max_document, skipped)
