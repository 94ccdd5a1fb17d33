"""Documents of text: plain files, JSON lines, Parquet and ArrayRecord.

Read `gated_jax/data/sources.py` first.
"""

import json
import pathlib
import sysconfig
from collections.abc import Callable
from collections.abc import Iterator
from typing import BinaryIO

from gated_jax.data.sources import Document
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.sources import Unit
from gated_jax.data.sources import byte_units
from gated_jax.data.sources import find_files

_RANGE = 16 << 20  # bytes of a text or JSONL file that are one unit
_RECORDS = 1024  # records of an ArrayRecord file that are one unit
# Folders of the standard library that not every system installs, or that hold
# other people's packages.
_NOT_LIBRARY = frozenset(
  ('site-packages', 'dist-packages', 'test', 'tests', 'idle_test')
)


def stdlib_files() -> list[str]:
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
  return [str(path) for path in sorted(files)]


class TextSource:
  """UTF-8 files: one document each, or several where one is very long.

  A file longer than `max_document` bytes is cut at line ends. A file that is
  not UTF-8 is left out whole (one of more than 16 MiB: that part of it).
  """

  def __init__(self, files: list[str], max_document: int, skipped: Skipped):
    self.skipped = skipped
    self.units = byte_units(files, _RANGE, skipped)
    self._max_document = max_document

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    raw = _whole_lines(unit)
    raw.decode('utf-8')  # all of it before any of it is used
    while cursor < len(raw):
      end = _piece_end(raw, cursor, self._max_document)
      text = raw[cursor:end].decode('utf-8')
      cursor = end
      yield cursor, Document(text, None, unit.path)


class JsonLinesSource:
  """One JSON object per line, its text in the field `column`."""

  def __init__(self, files: list[str], column: str, skipped: Skipped):
    self.skipped = skipped
    self.units = byte_units(files, _RANGE, skipped)
    self._column = column

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    for end, line in _lines(unit, cursor):
      if not line.strip():
        continue
      where = f'{unit.path} (line ending at byte {end})'
      try:
        text = json_text(line, self._column)
      except ValueError as error:
        self.skipped.add(where, error)
        continue
      yield end, Document(text, None, where)


class ParquetSource:
  """One document per row of the column `column`; a row group is a unit."""

  def __init__(self, files: list[str], column: str, skipped: Skipped):
    arrow, parquet = _parquet()

    self.skipped = skipped
    self._column = column
    self.units = []
    for path in files:
      try:
        with parquet.ParquetFile(path) as file:
          names = file.schema_arrow.names
          if column not in names:
            raise ValueError(f'no column {column!r}, only {", ".join(names)}')
          kind = file.schema_arrow.field(column).type
          if not (
            arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
          ):
            raise ValueError(f'column {column!r} is {kind}, not string')
          groups = file.num_row_groups
      except (OSError, ValueError, arrow.ArrowException) as error:
        skipped.add(path, error)
        continue
      if not groups:
        skipped.add(path, 'empty')
      self.units += [Unit(path, i, i + 1) for i in range(groups)]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    arrow, parquet = _parquet()

    try:
      with parquet.ParquetFile(unit.path) as file:
        row = 0
        for batch in file.iter_batches(
          batch_size=256, row_groups=[unit.begin], columns=[self._column]
        ):
          if row + len(batch) <= cursor:
            row += len(batch)
            continue
          for value in batch.column(0):
            row += 1
            if row > cursor:
              yield row, Document(value.as_py() or '', None, unit.path)
    except arrow.ArrowException as error:
      raise ValueError(f'damaged: {error}') from error


class ArrayRecordSource:
  """One document per record: UTF-8 text, or a JSON object with `column`."""

  def __init__(self, files: list[str], column: str, skipped: Skipped):
    self.skipped = skipped
    self._column = column
    self.units = []
    for path in files:
      try:
        reader = _array_record(path)
        total = reader.num_records()
        reader.close()
      except (OSError, ValueError, RuntimeError) as error:
        skipped.add(path, error)
        continue
      if not total:
        skipped.add(path, 'empty')
      self.units += [
        Unit(path, begin, min(begin + _RECORDS, total))
        for begin in range(0, total, _RECORDS)
      ]

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    reader = _array_record(unit.path)
    try:
      first = max(unit.begin, cursor)
      for begin in range(first, unit.end, 64):
        end = min(begin + 64, unit.end)
        for number, record in enumerate(reader.read(begin, end), begin + 1):
          where = f'{unit.path} (record {number - 1})'
          try:
            text = self._text(record)
          except ValueError as error:
            self.skipped.add(where, error)
            continue
          yield number, Document(text, None, where)
    finally:
      reader.close()

  def _text(self, record: bytes) -> str:
    if self._column and record.lstrip().startswith(b'{'):
      return json_text(record, self._column)
    return record.decode('utf-8')


def _array_record(path: str):
  """An open reader of the file."""
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise ImportError(
      f'{path} needs the package array-record: pip install gated_jax[hf]'
    ) from error
  reader = array_record_module.ArrayRecordReader(
    path, options='', file_reader_buffer_size=1 << 20
  )
  if not reader.ok():
    raise ValueError('damaged, truncated or no ArrayRecord file')
  return reader


def _parquet():
  """The two modules that read Parquet."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(
      'Parquet files need the package pyarrow: pip install gated_jax[hf]'
    ) from error
  return pyarrow, parquet


def json_text(line: bytes, column: str) -> str:
  """The string in the field `column` of the JSON object `line`."""
  try:
    record = json.loads(line.decode('utf-8'))
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  if not isinstance(record, dict):
    raise ValueError(f'a JSON {type(record).__name__}, not an object')
  if column not in record:
    raise ValueError(f'no field {column!r}, only {", ".join(record)[:80]}')
  if not isinstance(record[column], str):
    kind = type(record[column]).__name__
    raise ValueError(f'field {column!r} is a {kind}, not a string')
  record[column].encode('utf-8')  # JSON can spell half of a surrogate pair
  return record[column]


def _whole_lines(unit: Unit) -> bytes:
  """The lines that start inside the unit, in one piece."""
  with open(unit.path, 'rb') as file:
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


def _lines(unit: Unit, cursor: int) -> Iterator[tuple[int, bytes]]:
  """Lines that start inside the unit, each with the place after it."""
  with open(unit.path, 'rb') as file:
    if cursor:
      file.seek(cursor)
    else:
      _to_first_line(file, unit)
    place = file.tell()
    while place < unit.end:
      line = file.readline()
      if not line:
        _refuse_truncated(place, unit)
      place += len(line)
      yield place, line


def _piece_end(raw: bytes, begin: int, size: int) -> int:
  """Where a document of at most `size` bytes from `begin` on ends."""
  if len(raw) - begin <= size:
    return len(raw)
  line = raw.rfind(b'\n', begin, begin + size)
  if line >= 0:
    return line + 1
  end = begin + size
  while end > begin + 1 and raw[end] & 0xC0 == 0x80:
    end -= 1  # not inside a character
  return end


def make_text_source(
  kind: str, paths: str, column: str, max_document: int, skipped: Skipped
) -> Source:
  """The source that the word in `DataConfig.source` stands for."""
  files = stdlib_files() if kind == 'stdlib' else find_files(paths)
  return text_source(kind, files, column, max_document, skipped)


def text_source(
  kind: str,
  files: list[str],
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
  return table[kind](files, column, skipped)
