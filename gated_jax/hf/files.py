"""Folders of tensors: safetensors shards, read and written one at a time.

`pytorch_model.bin` is read without torch (`torch_file.py`). Folders may lie in
buckets: tensors are then read by ranges, and what is written is uploaded shard
by shard (`gated_jax/hf/new_folder.py`).
"""

import json
import math
import os
import pathlib
import reprlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gated_jax.data.files import DataFiles
from gated_jax.hf import torch_file
from gated_jax.paths import Path
from gated_jax.paths import is_file
from gated_jax.paths import is_folder
from gated_jax.paths import read_bytes
from gated_jax.paths import size


class Names(NamedTuple):
  """Names of the files that hold the weights of a folder."""

  listing: str  # names the shards; '': there is one file
  weights: str
  torch: bool = False


INDEX = 'model.safetensors.index.json'
WEIGHTS = 'model.safetensors'
TORCH_WEIGHTS = 'pytorch_model.bin'
MODEL_FILES = (
  Names(INDEX, WEIGHTS),
  Names('pytorch_model.bin.index.json', TORCH_WEIGHTS, torch=True),
)
ADAPTER_FILES = (
  Names('', 'adapter_model.safetensors'),
  Names('', 'adapter_model.bin', torch=True),
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Names of dtypes in config.json.
DTYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': BFLOAT16,
}
# Types in safetensors. One that is not here is quantised, or no weight at all.
_STORED = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}

JSON_BYTES = 1 << 28  # no config or index is nearly as large

Read = Callable[[str], np.ndarray]
Add = Callable[[Path], None]


def find_regular(folder: Path, name: str) -> Path | None:
  """A file of a folder that was made elsewhere; None where it is absent.

  Files of such a folder may name others and may be links. Neither may lead
  out of the folder, but for links into the cache of Hugging Face's own
  software, whose snapshots are made of them.

  Raises:
    ValueError: the name or a link leads elsewhere, or to no regular file.
  """
  plain = name not in ('', '.', '..') and '\0' not in name
  if not plain or pathlib.PurePath(name).name != name:
    raise ValueError(f'{folder}: {name!r} is not the name of a file in it')
  path = folder / name
  if not isinstance(path, pathlib.Path):  # a bucket has no links
    return path if is_file(path) else None
  assert isinstance(folder, pathlib.Path)
  try:
    if not (path.exists() or path.is_symlink()):
      return None
    target, home = path.resolve(strict=True), folder.resolve()
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from None
  blobs = home.parents[1] / 'blobs' if home.parent.name == 'snapshots' else home
  if home not in target.parents and blobs not in target.parents:
    raise ValueError(f'{path} is a link to {target}, outside of {folder}')
  if not target.is_file():
    raise ValueError(f'{path} is no regular file')
  return path


def read_json(path: Path) -> dict[str, Any]:
  """Contents of a file that was made elsewhere, which must be an object.

  Raises:
    ValueError: there is no such file, or something else in it.
  """
  if find_regular(path.parent, path.name) is None:
    raise ValueError(f'there is no file {path}')
  if size(path) > JSON_BYTES:
    raise ValueError(f'{path} is larger than {JSON_BYTES >> 20} MiB')
  try:
    values = json.loads(read_bytes(path))
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f'cannot read {path}: {reason}') from None
  except RecursionError:
    raise ValueError(f'{path} is nested too deeply') from None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds no object')
  return values


class TensorFiles:
  """The tensors of a folder, each read when it is asked for.

  Attributes:
    shapes: Shape of every tensor, by name.
    dtypes: Its dtype, as a key of `DTYPES`.

  Raises:
    ValueError: a file is missing, damaged, or holds what is no number.
  """

  def __init__(self, folder: Path, names: Sequence[Names] = MODEL_FILES):
    self.folder = folder
    self._names = names
    self._files = DataFiles()
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._read: dict[str, Read] = {}
    for path, add in self._shards():
      add(path)

  def read(self, name: str) -> np.ndarray:
    """ValueError where it holds what is no number."""
    array = self._read[name](name)
    # A sum is finite only if every number is.
    total = np.sum(array, dtype=np.float64)
    if not np.isfinite(total):
      raise ValueError(
        f'{self.folder}: tensor {name} is corrupt, it holds infinite numbers '
        'or none at all'
      )
    return array

  def _shards(self) -> Iterator[tuple[Path, Add]]:
    """The files and how to read each, after a look whether all are there."""
    if not is_folder(self.folder):
      raise ValueError(f'there is no folder {self.folder}')
    for names in self._names:
      add = self._add_torch if names.torch else self._add_safetensors
      if names.listing and find_regular(self.folder, names.listing) is not None:
        return iter([(path, add) for path in self._indexed(names.listing)])
      whole = find_regular(self.folder, names.weights)
      if whole is not None:
        return iter([(whole, add)])
    either = ' nor '.join(names.weights for names in self._names)
    index = ', nor an index of shards' if self._names[0].listing else ''
    raise ValueError(f'{self.folder} has no weights: neither {either}{index}')

  def _indexed(self, index: str) -> list[Path]:
    """The files that an index names."""
    path = self.folder / index
    weight_map = read_json(path).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f'{path} has no weight_map')
    shards = []
    for tensor, name in weight_map.items():
      if not isinstance(name, str):
        raise ValueError(
          f'{path}: the file of {tensor} is {reprlib.repr(name)}, no name'
        )
    for name in sorted(set(weight_map.values())):
      shard = find_regular(self.folder, name)
      if shard is None:
        raise ValueError(f'{path} names {name}, which is missing')
      shards.append(shard)
    return shards

  def _add(
    self, path: Path, name: str, shape: Any, dtype: str, read: Read
  ) -> None:
    if name in self.shapes:
      raise ValueError(
        f'tensor {name} is in two files of {self.folder}, one is {path.name}'
      )
    if dtype not in DTYPES:
      raise ValueError(
        f'{path}: tensor {name} has dtype {dtype}; only '
        f'{", ".join(DTYPES)} can be read'
      )
    self.shapes[name] = tuple(shape)
    self.dtypes[name] = dtype
    self._read[name] = read

  def _add_safetensors(self, path: Path) -> None:
    begin, header = self._header(path)

    def read(name: str) -> np.ndarray:
      """The tensor of a name, read into an array of its own."""
      about = header[name]
      first, last = about['data_offsets']
      raw = np.empty(last - first, np.uint8)
      first, last = begin + first, begin + last
      with self._files.open(os.fspath(path), first, last) as file:
        file.seek(first)
        if file.readinto(raw) != len(raw):
          raise ValueError(f'{path} is truncated')
      dtype = DTYPES[_STORED[about['dtype']]]
      return raw.view(dtype).reshape(about['shape'])

    for name, about in header.items():
      stored = about['dtype']
      dtype = _STORED.get(stored, stored)
      self._add(path, name, about['shape'], dtype, read)

  def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
    """The place where a file's tensors begin, and its header."""
    import safetensors

    # The library checks that the header is sound. It reads through mapped
    # pages, which would add up to a second model, so reading is done here. Of a
    # file in a bucket it is shown the header, and a hole for the rest.
    name = os.fspath(path)
    first = self._files.read(name, 0, min(8, self._files.size(name)))
    begin = 8 + int.from_bytes(first, 'little')
    copy = self._files.copy_of(name)
    if copy:
      copy.fill(0, min(begin, JSON_BYTES))
    try:
      with safetensors.safe_open(copy.path if copy else path, 'numpy'):
        pass
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(
        f'{path} is truncated or no safetensors file: {error}'
      ) from None
    header = json.loads(self._files.read(name, 8, begin))
    header.pop('__metadata__', None)
    return begin, header

  def _add_torch(self, path: Path) -> None:
    tensors = torch_file.describe(path)
    if not isinstance(tensors, dict):
      raise ValueError(
        f'{path} holds a {type(tensors).__name__}, not tensors by name'
      )
    for name, view in tensors.items():
      if not (isinstance(name, str) and isinstance(view, torch_file.View)):
        raise ValueError(
          f'{path}: {reprlib.repr(name)} is not the name of a tensor'
        )
      view.check(f'{path}: tensor {name}')

    def read(name: str) -> np.ndarray:
      """The tensor of a name."""
      view: torch_file.View = tensors[name]
      return view.read(path, DTYPES[view.storage.dtype])

    for name, view in tensors.items():
      self._add(path, name, view.shape, view.storage.dtype, read)


def write_tensors(
  folder: pathlib.Path,
  shapes: Sequence[tuple[str, tuple[int, ...]]],
  read: Read,
  dtypes: Mapping[str, str],
  shard_bytes: int,
  send: Callable[[pathlib.Path], None] = lambda _: None,
) -> None:
  """Writes tensors in order, holding those of one shard in memory.

  Args:
    folder: That exists.
    shapes: Name and shape of each.
    read: Makes the tensor of a name.
    dtypes: Each is stored in; keys of `DTYPES`, by name.
    shard_bytes: A file's size at most, but for a tensor that is larger.
    send: Takes each shard once it is written.
  """
  from safetensors.numpy import save_file

  shards: list[list[str]] = [[]]
  used, total = 0, 0
  for name, shape in shapes:
    need = DTYPES[dtypes[name]].itemsize * math.prod(shape)
    if shards[-1] and used + need > shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(name)
    used, total = used + need, total + need
  weight_map: dict[str, str] = {}
  for number, names in enumerate(shards, 1):
    file = WEIGHTS
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    weight_map |= dict.fromkeys(names, file)
    save_file(
      {
        name: read(name).astype(DTYPES[dtypes[name]], copy=False)
        for name in names
      },
      folder / file,
      metadata={'format': 'pt'},
    )
    send(folder / file)
  if len(shards) > 1:
    write_json(
      folder / INDEX,
      {'metadata': {'total_size': total}, 'weight_map': weight_map},
    )


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes JSON with sorted keys, so that equal configs are equal files."""
  text = json.dumps(values, indent=2, sort_keys=True)
  path.write_text(f'{text}\n', encoding='utf-8')
