"""Data sets that the Hugging Face library `datasets` reads.

A name on the hub, a local folder of files that the library knows, or one that
its `save_to_disk` wrote. Rows of a data set on disk are read by number, so any
place in it is found at once. A streamed one is read a shard at a time, and what
was used of a shard is read again when a run resumes.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from gated_jax.config import DataConfig
from gated_jax.data.conversations import FIELDS
from gated_jax.data.conversations import canonical
from gated_jax.data.conversations import columns_in
from gated_jax.data.files import DataFiles
from gated_jax.data.long_documents import cut_long
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit
from gated_jax.paths import local

_ROWS = 4096  # rows of a unit
_BATCH = 256  # rows that are read at once
_SAMPLES = 8  # rows that tell one data set from another


class HubSource(Records):
  """One document per row: text of the column `data.column`, or a conversation.

  `data.column=messages` makes it a conversation of the columns that
  `gated_jax/data/conversations.py` names.
  """

  def __init__(self, part: DataConfig, skipped: Skipped):
    self.skipped = skipped
    self.files = DataFiles()
    self._column = part.column
    self._is_chat = part.is_chat
    self._max_document = part.max_document
    self._data, revision = _load(part)
    self._check_column(part)
    if self._data.features is not None:  # other columns may be large
      names = FIELDS if part.is_chat else (part.column,)
      self._data = self._data.select_columns(
        [name for name in self._data.features if name in names]
      )
    name = f'{part.paths}@{revision}#{self._digest()}'
    self.units: list[Unit] = []
    if part.hub_streaming:
      shards = range(self._data.num_shards)
      self.units += [Unit(name, shard, shard + 1) for shard in shards]
    else:
      rows = len(self._data)
      if not rows:
        skipped.add(part.paths, 'empty')
      for begin in range(0, rows, _ROWS):
        self.units.append(Unit(name, begin, min(begin + _ROWS, rows)))
    self._streaming = part.hub_streaming

  def _check_column(self, part: DataConfig) -> None:
    """ValueError where there is no such column, or none of strings."""
    features = self._data.features
    if features is None:  # a stream says what it has only in its first row
      return
    if part.is_chat:
      try:
        columns_in(list(features))
      except ValueError as error:
        raise ValueError(f'data.paths={part.paths!r} has {error}') from None
      return
    if part.column not in features:
      raise ValueError(
        f'data.paths={part.paths!r} has no column {part.column!r}, only '
        f'{", ".join(features)}: set data.column'
      )
    kind = getattr(features[part.column], 'dtype', 'nested')
    if kind not in ('string', 'large_string'):
      raise ValueError(
        f'column {part.column!r} of data.paths={part.paths!r} is {kind}, not '
        'string'
      )

  def _digest(self) -> str:
    """Tells this data set from others of the same name."""
    digest = hashlib.blake2b(digest_size=8)
    if hasattr(self._data, '__len__'):
      rows = len(self._data)
      places = sorted({rows * i // _SAMPLES for i in range(_SAMPLES)})
      sample = [self._data[place] for place in places if place < rows]
      digest.update(str(rows).encode())
    else:
      sample = list(self._data.take(_SAMPLES))
    for row in sample:
      digest.update(repr(self._value(row)).encode())
    return digest.hexdigest()

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    if self._is_chat:
      return self._records(unit, cursor)
    return cut_long(self._records, unit, cursor, self._max_document)

  def _records(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    read = self._stream if self._streaming else self._rows
    for number, row in enumerate(read(unit, cursor), cursor + 1):
      where = f'{unit.path} (row {unit.begin + number - 1})'
      value = self._value(row)
      try:
        if self._is_chat:
          value = canonical(value)
        elif not isinstance(value, str):
          raise ValueError(f'a {type(value).__name__}, not a string')
      except ValueError as error:
        self.skipped.add(where, error)
        continue
      yield number, Document(value, None, where if self._is_chat else unit.path)

  def _value(self, row: dict[str, Any]) -> Any:
    """A row's contents in the columns that are read."""
    if self._is_chat:
      return {name: row[name] for name in FIELDS if name in row}
    return row.get(self._column)

  def _rows(self, unit: Unit, cursor: int) -> Iterator[dict[str, Any]]:
    """A unit's rows, from its row `cursor` on."""
    for begin in range(unit.begin + cursor, unit.end, _BATCH):
      end = min(begin + _BATCH, unit.end)
      columns = self._data[begin:end]
      for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))

  def _stream(self, unit: Unit, cursor: int) -> Iterator[dict[str, Any]]:
    """A shard's rows, from its row `cursor` on."""
    count = self._data.num_shards
    shard = self._data.shard(num_shards=count, index=unit.begin)
    yield from shard.skip(cursor)


def _load(part: DataConfig) -> tuple[Any, str]:
  """The data set, and the revision that it was found at; '': a local one."""
  try:
    import datasets
  except ImportError as error:
    raise ImportError(
      "data.source='huggingface' needs the package datasets: "
      'pip install gated_jax[hf]'
    ) from error
  path = local(part.paths)
  name = str(path) if path.exists() else part.paths
  try:
    if _is_saved(path):
      return _saved(datasets, path, part), ''
    options = {'name': part.hub_subset or None}
    if part.hub_revision:
      options['revision'] = part.hub_revision
    builder = datasets.load_dataset_builder(name, **options)
    data = datasets.load_dataset(
      name, split=part.hub_split, streaming=part.hub_streaming, **options
    )
  except Exception as error:
    # The library raises many kinds; all of them are of what was asked for.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f'data.paths={part.paths!r} with data.hub_split={part.hub_split!r}'
      + (f' and data.hub_subset={part.hub_subset!r}' if part.hub_subset else '')
      + f': {lines[0]}'
    ) from None
  found = re.search(
    r'hf://datasets/[^@]+@(\w+)', str(builder.config.data_files)
  )
  return data, found[1] if found else ''


def _is_saved(path: pathlib.Path) -> bool:
  names = ('dataset_dict.json', 'state.json')
  return any((path / name).is_file() for name in names)


def _saved(datasets: Any, path: pathlib.Path, part: DataConfig) -> Any:
  """A data set by `save_to_disk`: one split, or a folder for each."""
  data = datasets.load_from_disk(str(path))
  if isinstance(data, dict):
    if part.hub_split not in data:
      raise ValueError(f'there are the splits {", ".join(data)}')
    data = data[part.hub_split]
  if part.hub_streaming:
    return data.to_iterable_dataset(num_shards=max(1, len(data) // _ROWS))
  return data
