"""Documents of text in files of records: Parquet and ArrayRecord.

Read `gated_jax/data/sources.py` first.
"""

import json
from collections.abc import Iterator
from typing import Any

from gated_jax.data.long_documents import cut_long
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit

_RECORDS = 1024  # records of an ArrayRecord file that are one unit


class ParquetSource(Records):
  """One document per row of the column `column`; a row group is a unit."""

  def __init__(
    self, files: list[str], column: str, max_document: int, skipped: Skipped
  ):
    arrow, parquet = parquet_modules()

    self.skipped = skipped
    self._column = column
    self._max_document = max_document
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
    """See `Source`."""
    return cut_long(self._records, unit, cursor, self._max_document)

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    arrow, parquet = parquet_modules()

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


class ArrayRecordSource(Records):
  """One document per record: UTF-8 text, or a JSON object with `column`."""

  def __init__(
    self, files: list[str], column: str, max_document: int, skipped: Skipped
  ):
    self.skipped = skipped
    self._column = column
    self._max_document = max_document
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
    """See `Source`."""
    return cut_long(self._records, unit, cursor, self._max_document)

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    reader = _array_record(unit.path)
    try:
      first = max(unit.begin, cursor)
      for begin in range(first, unit.end, 64):
        end = min(begin + 64, unit.end)
        for number, record in enumerate(reader.read(begin, end), begin + 1):
          try:
            text = self._text(record)
          except ValueError as error:
            where = f'{unit.path} (record {number - 1})'
            self.skipped.add(where, error)
            continue
          yield number, Document(text, None, unit.path)
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


def parquet_modules() -> tuple[Any, Any]:
  """The two modules that read Parquet."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(
      'Parquet files need the package pyarrow: pip install gated_jax[hf]'
    ) from error
  return pyarrow, parquet


def json_object(line: bytes) -> dict[str, Any]:
  """The JSON object that a line holds."""
  try:
    record = json.loads(line.decode('utf-8'))
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  if not isinstance(record, dict):
    raise ValueError(f'a JSON {type(record).__name__}, not an object')
  return record


def json_text(line: bytes, column: str) -> str:
  """The string in the field `column` of the JSON object `line`."""
  record = json_object(line)
  if column not in record:
    raise ValueError(f'no field {column!r}, only {", ".join(record)[:80]}')
  if not isinstance(record[column], str):
    kind = type(record[column]).__name__
    raise ValueError(f'field {column!r} is a {kind}, not a string')
  text = record[column]
  if b'\\u' in line:
    text.encode('utf-8')  # JSON can spell half of a surrogate pair
  return text
