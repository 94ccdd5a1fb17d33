"""A folder of token arrays: what it is made from, and what is done already.

    corpus.json      what was asked for, and how the text is cut into arrays
    tokenizer.json   the tokenizer, so that the folder is whole (or *.model)
    00000.bin        ids; 00000.bin.json says their dtype and what they are
    00001.bin ...

Every file is written under another name and renamed when it is on disk. An
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

from gated_jax.data.sources import Unit

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


def sizes_of(units: Sequence[Unit]) -> list[float]:
  """Bytes on disk of each unit; units of one file count as equal."""
  counts = collections.Counter(unit.path for unit in units)
  each = {path: os.path.getsize(path) / n for path, n in counts.items()}
  return [each[unit.path] for unit in units]


def divide(units: Sequence[Unit]) -> tuple[tuple[int, int], ...]:
  """Units as runs of about equal size on disk: pairs of begin and end."""
  sizes = sizes_of(units)
  wanted = min(max(sum(sizes) / _ARRAYS, _SMALLEST), _LARGEST)
  runs, begin, held = [], 0, 0.0
  for place, size in enumerate(sizes, 1):
    held += size
    if held >= wanted or place == len(units):
      runs.append((begin, place))
      begin, held = place, 0.0
  return tuple(runs)


def array_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """The file of an array."""
  return folder / f'{number:05d}{_ENDING}'


def is_done(folder: pathlib.Path, number: int) -> bool:
  """Tells whether an array is there, whole."""
  return pathlib.Path(f'{array_path(folder, number)}.json').is_file()


def write(path: pathlib.Path, content: bytes) -> None:
  """A whole file or none, also where the power fails."""
  partial = path.with_name(path.name + PARTIAL)
  with open(partial, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Values on lines of their own, so that people can read them."""
  write(path, json.dumps(values, indent=1).encode() + b'\n')


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  """The tokenizer's file under its usual name, and what says how to use it."""
  beside = source.parent / TOKENIZER_CONFIG
  if beside.is_file():
    write(folder / TOKENIZER_CONFIG, beside.read_bytes())
  write(folder / f'tokenizer{source.suffix}', source.read_bytes())


def open_folder(
  folder: pathlib.Path, request: Request, units: Sequence[Unit]
) -> Plan:
  """The plan of a new folder, or of one that the same request was begun in.

  Raises:
    ValueError: the folder holds other things, or another request's arrays.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / PLAN
  if not path.is_file():
    others = [p.name for p in folder.iterdir() if p.name != PLAN + PARTIAL]
    if others:
      raise ValueError(
        f'{folder} is not empty ({sorted(others)[0]}) and has no {PLAN}: '
        'choose another --out'
      )
    plan = Plan(request, divide(units))
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
  for partial in folder.glob(f'*{PARTIAL}'):
    partial.unlink()
  return plan


def _read(path: pathlib.Path) -> Plan:
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    arrays = tuple((int(a), int(b)) for a, b in values['arrays'])
    return Plan(Request(**values['request']), arrays)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path} is damaged: {error}') from None
