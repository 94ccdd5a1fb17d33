"""Files of token ids: what is in them, by their header and the JSON beside.

A one-dimensional array of integers is `NAME.npy`, or raw as `NAME.bin`. Beside
it NAME.json (its whole name and `.json`) may say:

    dtype       of a raw file, which needs it
    eos         the id that ends a document; null: no id does
    tokens      how many ids there are
    tokenizer   a digest of the tokenizer that made them

`python -m gated_jax.data tokenize` writes all of them. What the JSON says has
to be true: an array that is read with another tokenizer's ends or another dtype
gives a model that is trained on noise. Read `gated_jax/data/token_sources.py`
next.
"""

import json
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import numpy as np

from gated_jax.data.files import DataFiles
from gated_jax.data.watch import FilesChangedError
from gated_jax.data.watch import IntegerFile
from gated_jax.paths import in_bucket

# `data.eos`: as the files or the tokenizer say; and: no id ends a document.
AS_STATED, NONE = -1, -2
BLOCK = 1 << 16  # ids searched for ends at once: they stay in cache


class ArrayFile(NamedTuple):
  """The place of a file's ids, and the one that ends a document."""

  path: str
  dtype: np.dtype
  offset: int  # bytes before the first id
  size: int  # ids
  eos: int  # -1: none
  file_bytes: int  # bytes of the whole file


class Contradiction(ValueError):
  """A file contradicts what it says of itself: mend it, do not skip it."""


class Wanted(NamedTuple):
  """The run's own statements about its arrays."""

  eos: int  # the setting data.eos
  tokenizer: str  # its name: 'bytes' unless it was chosen
  tokenizer_eos: int  # -1: it has none
  digest: str  # the tokenizer's


def open_array(
  path: str, wanted: Wanted, files: DataFiles | None = None
) -> ArrayFile:
  """Everything known of a file before its ids are read.

  Args:
    path: of the file.
    wanted: what the run says.
    files: open it; None: it is on a disk.

  Raises:
    Contradiction: it is not what the JSON beside it or the settings say.
    ValueError: it is damaged, or no array of the kind.
  """
  files = files or DataFiles([path])
  about = _about(path, files)
  file_bytes = files.size(path)
  if file_bytes == 0:
    raise ValueError('empty')
  if path.endswith('.npy'):
    dtype, offset, size = _header(path, files)
    stated = about.get('dtype', dtype.name)
    if stated != dtype.name:
      raise Contradiction(
        f'{path} holds {dtype.name}, but {path}.json says {stated!r}'
      )
  else:
    dtype, offset = _raw_dtype(path, about), 0
    if file_bytes % dtype.itemsize:
      raise ValueError(f'truncated: no whole number of {dtype}')
    size = file_bytes // dtype.itemsize
  tokens = about.get('tokens', size)
  if tokens != size:
    raise ValueError(f'damaged: {size} ids, where {path}.json says {tokens!r}')
  _check_tokenizer(path, about, wanted)
  eos = _eos(path, about, wanted)
  return ArrayFile(path, dtype, offset, size, eos, file_bytes)


def _header(path: str, files: DataFiles) -> tuple[np.dtype, int, int]:
  """NumPy's header: the dtype of the ids, its own bytes, how many ids."""
  with files.open(path) as file:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
      shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    offset = file.tell()
  if dtype.hasobject:
    raise ValueError('an array of Python objects')
  if len(shape) != 1 or dtype.kind not in 'iu':
    raise ValueError(f'an array {dtype}{list(shape)}, not one axis of integers')
  wanted = offset + shape[0] * dtype.itemsize
  if files.size(path) < wanted:
    raise ValueError(
      f'truncated: {files.size(path)} bytes, where {shape[0]} ids take {wanted}'
    )
  return dtype, offset, shape[0]


def _about(path: str, files: DataFiles) -> dict[str, Any]:
  beside = f'{path}.json'
  try:
    with files.open(beside) as file:
      text = file.read().decode('utf-8')
  except FileNotFoundError:
    return {}
  try:
    about = json.loads(text)
  except ValueError as error:
    raise ValueError(f'{beside} is no JSON: {error}') from None
  if not isinstance(about, dict):
    raise ValueError(f'{beside} holds no JSON object')
  return about


def _raw_dtype(path: str, about: dict[str, Any]) -> np.dtype:
  if 'dtype' not in about:
    raise ValueError(f'a raw array needs {path}.json with its dtype')
  try:
    dtype = np.dtype(about['dtype'])
  except TypeError:
    raise ValueError(f'{path}.json: no dtype {about["dtype"]!r}') from None
  if dtype.kind not in 'iu':
    raise ValueError(f'dtype {dtype} is not one of integers')
  return dtype


def _check_tokenizer(path: str, about: dict[str, Any], wanted: Wanted) -> None:
  stated = about.get('tokenizer', wanted.digest)
  if stated != wanted.digest:
    made = 'bytes' if stated == 'bytes' else f'a tokenizer with hash {stated}'
    raise Contradiction(
      f'{path} was made with {made:.60}, by {path}.json, and not with '
      f'data.tokenizer={wanted.tokenizer!r}: set data.tokenizer to the one '
      'that made it'
    )


def _eos(path: str, about: dict[str, Any], wanted: Wanted) -> int:
  """The end of a document that somebody has stated; -1: that there is none."""
  if 'eos' in about:
    stated = -1 if about['eos'] is None else about['eos']
    if type(stated) is not int or not -1 <= stated < 2**32:
      raise Contradiction(f'{path}.json: eos={stated!r} must be an id, or null')
    asked = -1 if wanted.eos == NONE else wanted.eos
    if wanted.eos != AS_STATED and asked != stated:
      raise Contradiction(
        f'data.eos={wanted.eos}, but {path}.json says {about["eos"]}'
      )
    return stated
  if wanted.eos == NONE:
    return -1
  if wanted.eos >= 0:
    return wanted.eos
  if wanted.tokenizer != 'bytes' and wanted.tokenizer_eos >= 0:
    return wanted.tokenizer_eos
  raise Contradiction(
    f'nothing says which id ends a document in {path}: set data.eos to it '
    f'({NONE}: no id does), or write {{"eos": ID}} to {path}.json'
  )


def stretch(array: ArrayFile, begin: int, end: int) -> tuple[int, int]:
  """The bytes that are read of some ids.

  The id before them may end a document, and the last one may end after them.
  """
  size = array.dtype.itemsize
  first, last = max(begin - 1, 0), end + BLOCK
  return array.offset + first * size, array.offset + last * size


def open_ids(
  array: ArrayFile, files: DataFiles, begin: int = 0, end: int = 0
) -> IntegerFile:
  """The ids of a file, to be closed.

  Args:
    array: what is known of it.
    files: open it.
    begin: where a stretch of ids begins that will be read to its end.
    end: of the stretch; 0: it is not known what will be read.

  Raises:
    FilesChangedError: the file is not as long as it was, or gone.
  """
  try:
    raw = None
    if in_bucket(array.path):
      where = stretch(array, begin, end) if end else (0, 0)
      raw = files.open(array.path, *where)
    file = IntegerFile(array.path, array.dtype, array.offset, array.size, raw)
    length = files.size(array.path)
  except OSError as error:
    raise FilesChangedError(
      f'{array.path} has changed since the run began to read it: {error}'
    ) from error
  if length != array.file_bytes:
    file.close()
    ids = (length - array.offset) // array.dtype.itemsize
    raise FilesChangedError(
      f'{array.path} has changed since the run began to read it: it had '
      f'{array.size} ids and has {max(ids, 0)}'
    )
  return file


def has_end(arrays: list[ArrayFile], files: DataFiles, most: int) -> bool:
  """Tells whether a document ends within the first `most` ids of all files."""
  return any(_ends(arrays, files, most))


def _ends(
  arrays: list[ArrayFile], files: DataFiles, most: int, size: int = BLOCK
) -> Iterator[bool]:
  for array in arrays:
    if array.eos < 0:
      yield True
    with open_ids(array, files) as ids:
      for begin in range(0, min(array.size, most), size):
        yield bool((ids[begin : begin + size] == array.eos).any())
    most -= array.size
    if most <= 0:
      return
