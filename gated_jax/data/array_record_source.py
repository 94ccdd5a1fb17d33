"""Documents of text in ArrayRecord files.

The package opens files by name alone, so one in a bucket is read through a
local file that is filled where it is read. Where a record begins the package
knows from the file's footer and does not say, but it notices a hole by its
checksums, and says at which byte: the hole is filled there, and the record read
again.

Read `gated_jax/data/sources.py` first.
"""

import re
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from gated_jax.data.copies import GRAIN
from gated_jax.data.copies import SparseCopy
from gated_jax.data.files import DataFiles
from gated_jax.data.long_documents import cut_long
from gated_jax.data.record_sources import json_text
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit

_RECORDS = 1024  # records of an ArrayRecord file that are one unit
_AT_ONCE = 64  # records that are read by one call


class ArrayRecordSource(Records):
  """One document per record: UTF-8 text, or a JSON object with `column`."""

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
    errors = (OSError, ValueError, RuntimeError)
    self.units = self.units_of_files(self._units, errors)

  def _units(self, path: str) -> list[Unit]:
    total = self._count(path)
    return [
      Unit(path, begin, min(begin + _RECORDS, total))
      for begin in range(0, total, _RECORDS)
    ]

  def _count(self, path: str) -> int:
    """How many records a file has."""
    with self._open(path) as file:
      return file.total

  def _open(self, path: str) -> 'ArrayRecords':
    return ArrayRecords(path, self.files.copy_of(path))

  def expect(self, unit: Unit) -> None:
    """See `Source`."""

    def prepare() -> None:
      """Fetches what the unit most likely is."""
      with self._open(unit.path) as file:
        file.expect(unit.begin, unit.end)

    self.files.soon(unit.path, prepare)

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    return cut_long(self._records, unit, cursor, self._max_document)

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    with self._open(unit.path) as file:
      first = max(unit.begin, cursor)
      file.expect(first, unit.end)
      for begin in range(first, unit.end, _AT_ONCE):
        end = min(begin + _AT_ONCE, unit.end)
        for number, record in enumerate(file.read(begin, end), begin + 1):
          try:
            text = self._text(record)
          except ValueError as error:
            where = f'{unit.path} (record {number - 1})'
            self.skipped.add(where, error)
            continue
          yield number, Document(text, None, unit.path)

  def _text(self, record: bytes) -> str:
    if self._column and record.lstrip().startswith(b'{'):
      return json_text(record, self._column)
    return record.decode('utf-8')


class ArrayRecords:
  """An open file of records.

  Args:
    path: of the file.
    copy: stands for it on the disk; None: it lies there itself.

  Raises:
    ValueError: it is no such file, or damaged.
  """

  def __init__(self, path: str, copy: SparseCopy | None):
    self._path, self._copy = path, copy
    self._reader: Any = None
    self.total: int = self._open_by_footer().num_records()

  def _open_by_footer(self) -> Any:
    """Opens the file; of one in a bucket, with as much of it as that takes."""
    tail = GRAIN  # the footer stands at the end, and how long it is, is unknown
    while True:
      if self._copy:
        self._copy.fill(self._copy.size - tail, self._copy.size)
      error = None
      try:
        reader = self._open()
        if reader.ok():
          return reader
      except RuntimeError as raised:
        error = raised
      if self._copy is None or tail >= self._copy.size:
        raise ValueError('damaged, truncated or no ArrayRecord file') from error
      tail *= 4

  def _open(self) -> Any:
    """The reader, opened anew: it holds bytes that it read before."""
    try:
      from array_record.python import array_record_module
    except ImportError as error:
      raise ImportError(
        f'{self._path} needs the package array-record: pip install '
        'gated_jax[hf]'
      ) from error
    self.close()
    self._reader = array_record_module.ArrayRecordReader(
      str(self._copy.path) if self._copy else self._path,
      options='',
      file_reader_buffer_size=1 << 20,
    )
    return self._reader

  def expect(self, begin: int, end: int) -> None:
    """Fetches where some records lie if all are about equally long."""
    if self._copy and self.total:
      size = self._copy.size
      self._copy.fill(
        size * begin // self.total - GRAIN, size * end // self.total + GRAIN
      )

  def read(self, begin: int, end: int) -> list[bytes]:
    """Some records."""
    while True:
      try:
        return self._reader.read(begin, end)
      except RuntimeError as error:
        if not (self._copy and _fill_hole(self._copy, str(error))):
          raise
      self._open()

  def close(self) -> None:
    """Lets go of the file."""
    if self._reader is not None:
      self._reader.close()

  def __enter__(self) -> 'ArrayRecords':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _fill_hole(copy: SparseCopy, message: str) -> bool:
  """Fetches what an error says is missing; False: nothing is.

  Args:
    copy: that was read.
    message: of the error, with places in the file.
  """
  places = [int(place) for place in re.findall(r'at (?:byte )?(\d+)', message)]
  holes = [place for place in places if copy.is_hole(place)]
  if holes:
    copy.fill(min(holes), min(holes) + 4 * GRAIN)
  elif copy.filled < copy.size:
    copy.fill(0, copy.size)  # it says something else than it did so far
  else:
    return False
  return True
