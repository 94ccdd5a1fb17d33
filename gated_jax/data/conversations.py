"""Conversations in JSON lines and Parquet, checked and written in one form.

A record holds `messages`, a list of them with a role and content, and perhaps
`tools`; or `prompt` and `completion`, each text or such a list. A document is
the JSON of `[messages, tools, first]`, where messages before `first` are never
targets: so which side of the held-out split it falls on is decided by what is
said, whatever the template. Read `gated_jax/data/chat.py` next.
"""

import json
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from gated_jax.data.files import DataFiles
from gated_jax.data.record_sources import Tables
from gated_jax.data.record_sources import json_object
from gated_jax.data.sources import Document
from gated_jax.data.sources import Records
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Unit
from gated_jax.data.text_sources import lines_of
from gated_jax.data.text_sources import ranges_of
from gated_jax.data.text_sources import stretch

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
FIELDS = ('messages', 'tools', 'prompt', 'completion')


class ConversationSource(Records):
  """One conversation per line of JSON, or per row of `*.parquet`."""

  def __init__(self, files: Sequence[str], skipped: Skipped):
    self.skipped = skipped
    self.files = DataFiles.of(files)
    self._tables = Tables(self.files, lambda schema: columns_in(schema.names))
    self.units = self.units_of_files(self._units)

  def _units(self, path: str) -> list[Unit]:
    if path.endswith('.parquet'):
      return self._tables.units(path)
    return ranges_of(self.files, path)

  def expect(self, unit: Unit) -> None:
    """See `Source`."""
    if unit.path.endswith('.parquet'):
      self._tables.expect(unit)
    else:
      self.files.expect(unit.path, *stretch(unit))

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    rows = self._rows if unit.path.endswith('.parquet') else self._lines
    for after, where, record in rows(unit, cursor):
      try:
        if isinstance(record, bytes):
          record = json_object(record)
        text = canonical(record)
      except ValueError as error:
        self.skipped.add(where, error)
        continue
      yield after, Document(text, None, where)

  def _lines(self, unit: Unit, cursor: int) -> Iterator[tuple[int, str, bytes]]:
    """Lines that hold anything, and where they are."""
    for end, line in lines_of(self.files, unit, cursor):
      if line.strip():
        yield end, f'{unit.path} (line ending at byte {end})', line

  def _rows(
    self, unit: Unit, cursor: int
  ) -> Iterator[tuple[int, str, 'Record']]:
    """Rows of a row group behind the cursor, and where they are."""
    row = 0
    for batch in self._tables.batches(unit):
      if row + len(batch) <= cursor:
        row += len(batch)
        continue
      for record in batch.to_pylist():
        row += 1
        if row > cursor:
          where = f'{unit.path} (row {row - 1} of row group {unit.begin})'
          yield row, where, record


def columns_in(names: Sequence[str]) -> list[str]:
  """Those of a table's columns that conversations are read from.

  Raises:
    ValueError: they make none.
  """
  if 'messages' not in names and not {'prompt', 'completion'} <= {*names}:
    raise ValueError(
      "no column 'messages', and not both 'prompt' and 'completion', only "
      f'{", ".join(names)}'
    )
  return [name for name in FIELDS if name in names]


Record = Mapping[str, Any]


def canonical(record: Record) -> str:
  """The document of a record; ValueError where it is no conversation."""
  first = 0
  if record.get('messages') is not None:
    messages = _listed('messages', record['messages'])
  elif (
    record.get('prompt') is not None and record.get('completion') is not None
  ):
    prompt = _spoken('prompt', record['prompt'], 'user')
    first = len(prompt)
    messages = prompt + _spoken('completion', record['completion'], 'assistant')
  else:
    raise ValueError(
      "no field 'messages', and not both 'prompt' and 'completion', only "
      f'{", ".join(map(str, record))[:80]}'
    )
  if not messages:
    raise ValueError('no message')
  cleaned = [_message(i, message) for i, message in enumerate(messages)]
  if all(message['role'] != 'assistant' for message in cleaned[first:]):
    raise ValueError("no turn of the assistant's")
  tools = _listed('tools', record.get('tools') or [])
  text = json.dumps([cleaned, tools, first], ensure_ascii=False)
  text.encode('utf-8')  # JSON can spell half of a surrogate pair
  return text


def _listed(name: str, value: Any) -> list[Any]:
  """A list, or the JSON of one, as columns of text hold it."""
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      raise ValueError(f'{name} is text, and no JSON') from None
  if not isinstance(value, list):
    raise ValueError(f'{name} is a {type(value).__name__}, not a list')
  return value


def _spoken(name: str, value: Any, role: str) -> list[Any]:
  """Text as one message of a role, or messages as they are."""
  if isinstance(value, str):
    return [{'role': role, 'content': value}]
  return _listed(name, value)


def _message(i: int, message: Any) -> dict[str, Any]:
  """A message with what it states; Parquet states every field as null."""
  if not isinstance(message, dict):
    raise ValueError(
      f'message {i} is a {type(message).__name__}, not an object'
    )
  message = {
    key: value
    for key, value in message.items()
    if value is not None or key == 'content'
  }
  role = message.get('role')
  if role not in ROLES:
    raise ValueError(f'message {i} has role={role!r}, not {", ".join(ROLES)}')
  content = message.setdefault('content', None)
  if content is not None and not isinstance(content, str | list):
    kind = type(content).__name__
    raise ValueError(f'message {i} has content that is a {kind}, not text')
  says = content.strip() if isinstance(content, str) else content
  if (
    role in ('user', 'assistant') and not says and not message.get('tool_calls')
  ):
    raise ValueError(f'message {i} ({role}) says nothing')
  return message
