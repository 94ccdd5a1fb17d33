"""Documents of text in rows of Parquet, and in objects of JSON.

Read `gated_jax/data/sources.py` first.
"""

import collections
import contextlib
import json
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from gated_jax.data.files import DataFiles
from gated_jax.data.long_documents import cut_long
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit
from gated_jax.paths import in_bucket

_FOOTERS = 64  # held for files in buckets; that of a wide table is large
_DECODER = json.JSONDecoder()


class Tables:
  """Parquet files, of which a unit is a row group.

  Args:
    files: their names, and perhaps others'.
    columns: which are read of a file with some names and types; ValueError: it
      lacks them.
  """

  def __init__(self, files: DataFiles, columns: Callable[[Any], list[str]]):
    self._files = files
    self._columns = columns
    # For files in buckets, where reading one is two more requests.
    self._footers: collections.OrderedDict[str, Any] = collections.OrderedDict()

  def units(self, path: str) -> list[Unit]:
    """The row groups of a file.

    Raises:
      ValueError: it is damaged, or lacks columns.
    """
    arrow, _ = parquet_modules()
    try:
      with self._open(path) as file:
        self._columns(file.schema_arrow)
        return [Unit(path, i, i + 1) for i in range(file.num_row_groups)]
    except arrow.ArrowException as error:
      raise ValueError(str(error)) from error

  def expect(self, unit: Unit) -> None:
    """Begins to fetch a row group."""

    def prepare() -> None:
      """Its place is known from the footer, which may have to be read."""
      if unit.path not in self._footers:
        self.units(unit.path)
      self._files.expect(unit.path, *self._stretch(unit))

    self._files.soon(unit.path, prepare)

  def batches(self, unit: Unit) -> Iterator[Any]:
    """The rows of a row group, in record batches of the columns."""
    arrow, _ = parquet_modules()
    try:
      with self._open(unit.path, unit) as file:
        yield from file.iter_batches(
          batch_size=256,
          row_groups=[unit.begin],
          columns=self._columns(file.schema_arrow),
        )
    except arrow.ArrowException as error:
      raise ValueError(f'damaged: {error}') from error

  @contextlib.contextmanager
  def _open(self, path: str, unit: Unit | None = None) -> Iterator[Any]:
    """An open file, of which one row group will be read, or the footer."""
    _, parquet = parquet_modules()
    if not in_bucket(path):
      with parquet.ParquetFile(path) as file:
        yield file
      return
    footer = self._footers.get(path)
    stretch = self._stretch(unit) if unit and footer else (0, 0)
    with self._files.open(path, *stretch) as raw:
      # All of the columns at once: each alone would be far more requests.
      file = parquet.ParquetFile(raw, metadata=footer, pre_buffer=True)
      self._footers[path] = file.metadata
      while len(self._footers) > _FOOTERS:
        self._footers.popitem(last=False)
      yield file

  def _stretch(self, unit: Unit) -> tuple[int, int]:
    """The bytes of a row group's columns that are read."""
    footer = self._footers[unit.path]
    names = self._columns(footer.schema.to_arrow_schema())
    group = footer.row_group(unit.begin)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [c for c in chunks if c.path_in_schema.split('.')[0] in names]
    # A dictionary stands before the pages that need it.
    begins = [c.dictionary_page_offset or c.data_page_offset for c in chunks]
    sizes = [c.total_compressed_size for c in chunks]
    ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    return min(begins), max(ends)


class ParquetSource(Records):
  """One document per row of the column `column`; a row group is a unit."""

  def __init__(
    self,
    files: Sequence[str],
    column: str,
    max_document: int,
    skipped: Skipped,
  ):
    self.skipped = skipped
    self._column = column
    self._max_document = max_document
    self.files = DataFiles.of(files)
    self._tables = Tables(self.files, self._columns)
    self.units = self.units_of_files(self._tables.units)

  def _columns(self, schema: Any) -> list[str]:
    """The column; ValueError where there is none, or none of strings."""
    arrow, _ = parquet_modules()
    column = self._column
    if column not in schema.names:
      raise ValueError(f'no column {column!r}, only {", ".join(schema.names)}')
    kind = schema.field(column).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
      raise ValueError(f'column {column!r} is {kind}, not string')
    return [column]

  def expect(self, unit: Unit) -> None:
    """See `Source`."""
    self._tables.expect(unit)

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    return cut_long(self._records, unit, cursor, self._max_document)

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    row = 0
    for batch in self._tables.batches(unit):
      if row + len(batch) <= cursor:
        row += len(batch)
        continue
      for text in batch.column(0).to_pylist():
        row += 1
        if row > cursor:
          yield row, Document(text or '', None, unit.path)


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
    record = _decode(line.decode('utf-8'))
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  if not isinstance(record, dict):
    raise ValueError(f'a JSON {type(record).__name__}, not an object')
  return record


def _decode(text: str) -> Any:
  """`json.loads`, which spends as long on its arguments as on a line of text.

  It is left to say what is wrong, and to read what begins with white space.
  """
  try:
    record, end = _DECODER.raw_decode(text)
  except ValueError:
    return json.loads(text)
  return json.loads(text) if text[end:].strip(' \t\r\n') else record


def json_text(line: bytes, column: str) -> str:
  """The string in the field `column` of the JSON object `line`."""
  record = json_object(line)
  if column not in record:
    raise ValueError(f'no field {column!r}, only {", ".join(record)[:80]}')
  if not isinstance(record[column], str):
    kind = type(record[column]).__name__
    raise ValueError(f'field {column!r} is a {kind}, not a string')
  text = record[column]
  if not text.isascii() and b'\\u' in line:
    text.encode('utf-8')  # JSON can spell half of a surrogate pair
  return text
