"""The lines of a run's metrics.jsonl, on a disk and in a bucket.

On a disk it is a file. A bucket's objects cannot be appended to, so there it is
a folder with one folder for each start of the run:

    metrics.jsonl/000002/000000.jsonl  what the third start kept of the second's
    metrics.jsonl/000002/000001.jsonl  what it measured itself, part by part

Each object is written whole, and part 0 before anything of an earlier start is
removed: the newest start that has a part 0 is the record, at any moment.
Read `gated_jax/training/lines.py` for who writes them.
"""

import contextlib
import json
import pathlib
from typing import Any

from gated_jax import paths
from gated_jax.paths import Path

NAME = 'metrics.jsonl'
TRIES = 3  # readings of a record that a start replaces meanwhile


def part(path: Path, start: int, number: int) -> Path:
  """Where a part of a start's lines lies."""
  return path / f'{start:06}' / f'{number:06}.jsonl'


def parts_of(path: Path) -> dict[int, list[Path]]:
  """The parts of each start that has a part 0, in order."""
  starts: dict[int, list[Path]] = {}
  for file in paths.files_below(path):
    if file.parent.name.isdigit() and file.stem.isdigit():
      starts.setdefault(int(file.parent.name), []).append(file)
  return {
    start: files for start, files in starts.items() if not int(files[0].stem)
  }


def read_text(path: Path) -> str:
  """All lines; '' where there are none. A kill may have cut the last short."""
  if isinstance(path, pathlib.Path):
    if not path.exists():
      return ''
    return path.read_text(encoding='utf-8', errors='replace')
  for attempt in range(TRIES):
    starts = parts_of(path)
    newest = starts.get(max(starts, default=-1), [])
    try:
      data = b''.join(paths.read_bytes(file) for file in newest)
    except FileNotFoundError:  # a new start has removed it
      if attempt == TRIES - 1:
        raise
    else:
      return data.decode('utf-8', errors='replace')
  return ''


def read(path: Path) -> list[dict[str, Any]]:
  """The records of a run, in order, without what is no record."""
  records = []
  for line in read_text(path).splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      record = json.loads(line)
      if isinstance(record, dict) and isinstance(record.get('step'), int):
        records.append(record)
  return records


def runs_in(path: Path) -> list[Path]:
  """The folders of runs in a folder and below it, sorted."""
  if isinstance(path, pathlib.Path):
    return sorted(p.parent for p in path.glob(f'**/{NAME}'))
  folders = {
    file.parent.parent.parent
    for file in paths.files_below(path)
    if file.parent.parent.name == NAME
  }
  return sorted(folders)
