"""Sources of documents: files, cut into units that can be read alone.

A source lists its units without reading them: a unit is a file, or a part of
one that is small enough to hold in memory and can be found without reading what
lies before. Units are what is shuffled and dealt to processes. `read(unit,
cursor)` yields `(cursor, document)` pairs, where each cursor is the place after
its document, so a run resumes in the middle of a unit. `blocks` yields many
documents at once, which is what keeps up with a device.

What cannot be read is told to `Skipped` and left out; it is an error only when
nothing is left, or where a file is not what it was when it was found. Files are
found and opened by `gated_jax/data/files.py`. Text is
`gated_jax/data/text_sources.py`'s, arrays and synthetic tokens are
`gated_jax/data/token_sources.py`'s.
"""

import logging
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import numpy as np
from jaxtyping import Int
from jaxtyping import Int64

from gated_jax.data.files import DataFiles
from gated_jax.data.watch import FilesChangedError

_LOG = logging.getLogger(__name__)
_LOGGED = 10  # files that are named in the log; all are in the report
# Characters, or ids, that are read at once, and at most so many documents.
_BLOCK, _BLOCK_DOCUMENTS = 1 << 18, 1024
# Errors of damaged or vanished files; a UnicodeDecodeError is a ValueError.
READ_ERRORS = (OSError, ValueError, RuntimeError, LookupError)


class Unit(NamedTuple):
  """A part of a file; what `begin` and `end` count is the source's affair."""

  path: str
  begin: int
  end: int


class Document(NamedTuple):
  """Either text, or ids made elsewhere, and where it was found."""

  text: str
  ids: np.ndarray | None
  origin: str


class Texts(NamedTuple):
  """Documents of text that follow each other in a unit."""

  cursors: list[int]  # the place after each
  texts: list[str]
  origins: list[str]  # the file and place of each text


class Ids(NamedTuple):
  """The same of ids: one array of them all, and the length of each."""

  cursors: Sequence[int] | Int64[np.ndarray, ' N']
  ids: Int[np.ndarray, ' T']
  lengths: Int64[np.ndarray, ' N']


Block = Texts | Ids


@runtime_checkable
class Source(Protocol):
  """Units, and how to read one."""

  units: list[Unit]
  skipped: 'Skipped'
  files: DataFiles  # none where documents are made up

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """Yields the documents of `unit` from `cursor` on; 0: its beginning."""

  def blocks(self, unit: Unit, cursor: int) -> Iterator[Block]:
    """Yields the same in blocks, which do not go beyond the unit."""

  def expect(self, unit: Unit) -> None:
    """Begins to fetch a unit that is not at hand and will be read next."""


class Records:
  """Blocks for a source that reads documents one by one."""

  files: DataFiles
  skipped: 'Skipped'

  def units_of_files(
    self,
    look: Callable[[str], list[Unit]],
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
  ) -> list[Unit]:
    """The units of all files; damaged and empty files are noted.

    Args:
      look: the units of one file.
      errors: what a damaged file raises.
    """
    units = []
    for path, result in self.files.each(look):
      try:
        of_file = result()
      except errors as error:
        self.skipped.add(path, error)
        continue
      if not of_file:
        self.skipped.add(path, 'empty')
      units += of_file
    return units

  def read(self, unit: Unit, cursor: int) -> Iterator[tuple[int, Document]]:
    """See `Source`."""
    raise NotImplementedError

  def expect(self, unit: Unit) -> None:
    """See `Source`; nothing is needed where documents are at hand."""

  def blocks(self, unit: Unit, cursor: int) -> Iterator[Block]:
    """See `Source`. An error comes after the documents before it."""
    cursors: list[int] = []
    block: list[Document] = []
    size = 0
    try:
      for after, document in self.read(unit, cursor):
        cursors.append(after)
        block.append(document)
        size += len(document.text if document.ids is None else document.ids)
        if size >= _BLOCK or len(block) == _BLOCK_DOCUMENTS:
          yield _block(cursors, block)
          cursors, block, size = [], [], 0
    except READ_ERRORS:
      if block:
        yield _block(cursors, block)
      raise
    if block:
      yield _block(cursors, block)


def _block(cursors: list[int], documents: list[Document]) -> Block:
  ids = [d.ids for d in documents if d.ids is not None]
  if not ids:
    return Texts(
      cursors, [d.text for d in documents], [d.origin for d in documents]
    )
  return Ids(cursors, np.concatenate(ids), np.array([len(x) for x in ids]))


class Skipped:
  """Files, or parts of them, that were left out, each with its reason.

  It counts conversations that were cut to a row, too, which are not left out.

  `log`: whether to say so when it happens, besides in the report.
  """

  def __init__(self, log: bool = True):
    self._log = log
    self._reasons: dict[str, str] = {}
    self._cut: set[str] = set()
    self._lock = threading.Lock()

  def add(self, where: str, reason: object) -> None:
    """Notes `where` once, however often it is met again.

    Raises:
      FilesChangedError: that is the reason; nothing is left out for it.
    """
    if isinstance(reason, FilesChangedError):
      raise reason
    lines = str(reason).strip().splitlines()
    line = lines[0] if lines else type(reason).__name__
    with self._lock:
      if where in self._reasons:
        return
      self._reasons[where] = line
      count = len(self._reasons)
    if not self._log:
      return
    if count <= _LOGGED:
      _LOG.warning('skipped %s: %s', where, line)
    if count == _LOGGED:
      _LOG.warning('further skipped files are counted, but not logged')

  def cut(self, where: str) -> None:
    """Notes a conversation that lost its beginning, once."""
    with self._lock:
      self._cut.add(where)

  @property
  def shortened(self) -> int:
    """Conversations that lost their beginning."""
    return len(self._cut)

  def report(self) -> dict[str, str]:
    """Everything skipped so far: name to reason, in the order met."""
    with self._lock:
      return dict(self._reasons)

  def __len__(self) -> int:
    return len(self._reasons)

  def summary(self) -> str:
    """One line: how many, and the first few by name."""
    report = self.report()
    first = '; '.join(f'{k}: {v}' for k, v in list(report.items())[:3])
    return f'{len(report)} skipped ({first})' if report else 'none skipped'


def byte_units(files: DataFiles, size: int, skipped: Skipped) -> list[Unit]:
  """Cuts files into ranges of at most `size` bytes; empty ones are skipped."""
  units = []
  for path in files:
    try:
      parts = byte_ranges(files, path, size)
    except OSError as error:
      skipped.add(path, error.strerror or error)
      continue
    if not parts:
      skipped.add(path, 'empty')
    units += parts
  return units


def byte_ranges(files: DataFiles, path: str, size: int) -> list[Unit]:
  """The ranges of one file; none where it is empty."""
  total = files.size(path)
  return [
    Unit(path, begin, min(begin + size, total))
    for begin in range(0, total, size)
  ]
