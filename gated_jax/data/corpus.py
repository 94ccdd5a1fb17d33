"""A folder of token arrays: what it is made from, and what is done already.

    corpus.json      what was asked for, and how the text is cut into arrays
    tokenizer.json   the tokenizer, so that the folder is whole (or *.model)
    00000.bin        ids; 00000.bin.json says their dtype and what they are
    00001.bin ...

Every file is written under another name and renamed when it is on disk, or is
an object of a bucket, which appears whole. An
array is done when its JSON is there, so whoever is killed goes on with the
arrays that are not. Read `gated_jax/data/tokenize.py` next.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from gated_jax.data.files import DataFiles
from gated_jax.data.sources import Unit
from gated_jax.paths import Path
from gated_jax.paths import check_bucket
from gated_jax.paths import files_below
from gated_jax.paths import is_file
from gated_jax.paths import read_bytes
from gated_jax.paths import write_bytes

PLAN = 'corpus.json'
PARTIAL = '.partial'
_ENDING = '.bin'
# Files beside a tokenizer's that are part of its meaning.
TOKENIZER_CONFIG = 'tokenizer_config.json'
# Bytes of text that one array is made of: little enough that many processes
# have work, and enough that a large corpus is no heap of small files.
_SMALLEST, _LARGEST, _ARRAYS = 4 << 20, 512 << 20, 256


@dataclasses.dataclass(frozen=True)
class Request:
  """Sources and settings that a folder is made from; it serves no others."""

  source: str
  column: str
  max_document: int
  files: str  # a digest of the names and sizes
  tokenizer: str  # a digest, or 'bpe' and the vocabulary to train
  special_tokens: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """A request, and for each array the first and last unit that it is of."""

  request: Request
  arrays: tuple[tuple[int, int], ...]


def digest_of_units(units: Sequence[Unit]) -> str:
  """Changes with the names and sizes of files, not with where they lie."""
  digest = hashlib.blake2b(digest_size=8)
  for unit in units:
    name = os.path.basename(unit.path)
    digest.update(repr((name, unit.begin, unit.end)).encode())
  return digest.hexdigest()


def sizes_of(units: Sequence[Unit], files: DataFiles) -> list[float]:
  """Bytes of each unit in its file; units of one file count as equal."""
  counts = collections.Counter(unit.path for unit in units)
  each = {path: files.size(path) / n for path, n in counts.items()}
  return [each[unit.path] for unit in units]


def divide(
  units: Sequence[Unit], files: DataFiles
) -> tuple[tuple[int, int], ...]:
  """Units as runs of about equal size in files: pairs of begin and end."""
  sizes = sizes_of(units, files)
  wanted = min(max(sum(sizes) / _ARRAYS, _SMALLEST), _LARGEST)
  runs, begin, held = [], 0, 0.0
  for place, size in enumerate(sizes, 1):
    held += size
    if held >= wanted or place == len(units):
      runs.append((begin, place))
      begin, held = place, 0.0
  return tuple(runs)


def array_path(folder: Path, number: int) -> Path:
  """The file of an array."""
  return folder / f'{number:05d}{_ENDING}'


def about_path(array: Path) -> Path:
  """The JSON beside an array."""
  return array.with_name(f'{array.name}.json')


def is_done(folder: Path, number: int) -> bool:
  """Tells whether an array is there, whole."""
  return is_file(about_path(array_path(folder, number)))


def write(path: Path, content: bytes) -> None:
  """A whole file or none, also where the power fails."""
  if not isinstance(path, pathlib.Path):
    write_bytes(path, content)
    return
  partial = path.with_name(path.name + PARTIAL)
  with open(partial, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
  """Values on lines of their own, so that people can read them."""
  write(path, json.dumps(values, indent=1).encode() + b'\n')


def copy_tokenizer(source: Path, folder: Path) -> None:
  """The tokenizer's file under its usual name, and what says how to use it."""
  beside = source.parent / TOKENIZER_CONFIG
  if is_file(beside):
    write(folder / TOKENIZER_CONFIG, read_bytes(beside))
  write(folder / f'tokenizer{source.suffix}', read_bytes(source))


def open_folder(
  folder: Path,
  request: Request,
  units: Sequence[Unit],
  files: DataFiles,
) -> Plan:
  """The plan of a new folder, or of one that the same request was begun in.

  Raises:
    ValueError: the folder holds other things, or another request's arrays.
  """
  if isinstance(folder, pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
  else:
    check_bucket(folder)
    if is_file(folder):
      raise ValueError(f'{folder} is an object: choose another --out')
  path = folder / PLAN
  if not is_file(path):
    names = [p.relative_to(folder).parts[0] for p in files_below(folder)]
    others = [name for name in names if name != PLAN + PARTIAL]
    if others:
      raise ValueError(
        f'{folder} is not empty ({sorted(others)[0]}) and has no {PLAN}: '
        'choose another --out'
      )
    plan = Plan(request, divide(units, files))
    write_json(path, dataclasses.asdict(plan))
    return plan
  plan = _read(path)
  for name, there in dataclasses.asdict(plan.request).items():
    here = getattr(request, name)
    if there != here:
      raise ValueError(
        f'{folder} was begun with {name}={there!r}, not {here!r}: use the same '
        'settings or another --out'
      )
  if isinstance(folder, pathlib.Path):
    for partial in folder.glob(f'*{PARTIAL}'):
      partial.unlink()
  return plan


def _read(path: Path) -> Plan:
  try:
    values = json.loads(read_bytes(path))
    arrays = tuple((int(a), int(b)) for a, b in values['arrays'])
    return Plan(Request(**values['request']), arrays)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path} is damaged: {error}') from None
