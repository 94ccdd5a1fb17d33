"""Where the lines of metrics.jsonl go: a file, or objects in a bucket.

Both drop what an earlier start wrote after the step that this one resumes from,
and what a kill cut short. Read `gated_jax/evals/metric_files.py` for how the
lines lie in a bucket.
"""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from gated_jax import paths
from gated_jax.bucket_requests import TRIES
from gated_jax.bucket_requests import patiently
from gated_jax.evals import metric_files
from gated_jax.paths import Path

# Seconds between two times that the newest part is brought to the bucket.
EVERY = 30.0
PART = 1 << 18  # bytes after which another part is begun
_LOG = logging.getLogger(__name__)


def _text(records: Sequence[dict[str, Any]]) -> str:
  return ''.join(json.dumps(record) + '\n' for record in records)


class FileLines:
  """A file that every line is appended to at once.

  Args:
    path: of the file.
    after: records after this step are dropped.
  """

  def __init__(self, path: pathlib.Path, after: int):
    self.kept = [r for r in metric_files.read(path) if r['step'] <= after]
    if path.exists():
      new = path.with_suffix('.jsonl.new')
      new.write_text(_text(self.kept), encoding='utf-8')
      os.replace(new, path)
    self._file = path.open('a', encoding='utf-8')

  def add(self, line: str) -> None:
    """Writes a line; OSError where the disk does not take it."""
    self._file.write(line)
    self._file.flush()

  def save(self) -> None:
    """Every line is on the disk already."""

  def close(self) -> None:
    """Lets go of the file; what a full disk did not take is dropped."""
    with contextlib.suppress(OSError):
      self._file.close()


class BucketLines:
  """Objects that lines are brought to on a schedule and by `save`.

  Args:
    path: of the folder that the objects lie in.
    after: records after this step are dropped.
  """

  def __init__(self, path: Path, after: int):
    self.kept = [r for r in metric_files.read(path) if r['step'] <= after]
    earlier = metric_files.parts_of(path)
    self._path, self._start = path, max(earlier, default=-1) + 1
    self._number, self._lines, self._dirty = 1, '', False
    first = metric_files.part(path, self._start, 0)
    paths.write_bytes(first, _text(self.kept).encode())
    for start in earlier:
      paths.remove_folder(metric_files.part(path, start, 0).parent)
    self._due = time.monotonic() + EVERY

  def add(self, line: str) -> None:
    """Keeps a line; the bucket has it after EVERY seconds at the latest."""
    self._lines += line
    self._dirty = True
    if time.monotonic() < self._due:
      return
    try:
      self.save(tries=1)
    except OSError as error:  # the next checkpoint needs it, not this step
      self._due = time.monotonic() + EVERY
      _LOG.warning('metrics wait to be written: %s', error)

  def save(self, tries: int = TRIES) -> None:
    """Brings all lines to the bucket; OSError where it does not take them."""
    if self._dirty:
      part = metric_files.part(self._path, self._start, self._number)
      data = self._lines.encode()
      patiently(lambda: paths.write_bytes(part, data), tries)
      self._dirty = False
      if len(self._lines) > PART:
        self._number, self._lines = self._number + 1, ''
    self._due = time.monotonic() + EVERY

  def close(self) -> None:
    """Brings the rest to the bucket; what it does not take is dropped."""
    with contextlib.suppress(OSError):
      self.save(tries=1)


def lines_at(path: Path, after: int) -> FileLines | BucketLines:
  """The lines at a path, of either kind."""
  if isinstance(path, pathlib.Path):
    return FileLines(path, after)
  return BucketLines(path, after)
