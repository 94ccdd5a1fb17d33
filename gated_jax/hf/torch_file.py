"""Tensors of a file that torch.save wrote, without torch.

Such a file is a zip archive: `data.pkl` describes tensors as views of storages,
and each storage is a member of plain numbers. Pickle can run anything, so only
the few names are allowed that descriptions of tensors are made of.
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np

from gated_jax.paths import Path
from gated_jax.paths import in_bucket
from gated_jax.paths import open_for_reading

LARGEST = 1 << 28  # bytes of a description; none is nearly as large
# Storages of torch, as names of dtypes.
_STORAGES = {
  'BFloat16Storage': 'bfloat16',
  'HalfStorage': 'float16',
  'FloatStorage': 'float32',
  'DoubleStorage': 'float64',
  'CharStorage': 'int8',
  'ByteStorage': 'uint8',
  'ShortStorage': 'int16',
  'IntStorage': 'int32',
  'LongStorage': 'int64',
  'BoolStorage': 'bool',
}


class Storage(NamedTuple):
  """Numbers that tensors are views of."""

  dtype: str
  member: str  # of the archive
  size: int  # how many numbers


class View(NamedTuple):
  """A tensor, as a view of a storage; offset and strides count numbers."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def end(self) -> int:
    """One past the last number of the storage that it reaches."""
    steps = zip(self.shape, self.strides, strict=True)
    return self.offset + 1 + sum((n - 1) * step for n, step in steps)

  def check(self, where: str) -> None:
    """ValueError where it is no view of its storage."""
    plain = (self.offset, *self.shape, *self.strides)
    sound = (
      all(type(x) is int and x >= 0 for x in plain)
      and len(self.shape) == len(self.strides)
      # Strides of zero make a few bytes look like any number of them.
      and math.prod(self.shape) <= self.storage.size
      and (0 in self.shape or self.end <= self.storage.size)
    )
    if not sound:
      raise ValueError(
        f'{where} of shape {self.shape} has more numbers than are stored'
      )

  def read(self, path: Path, dtype: np.dtype) -> np.ndarray:
    """The tensor, from the archive at a path."""
    if 0 in self.shape:
      return np.zeros(self.shape, dtype)
    want = (self.end - self.offset) * dtype.itemsize
    try:
      with (
        open_for_reading(path) as raw_file,
        zipfile.ZipFile(raw_file) as archive,
        archive.open(self.storage.member) as file,
      ):
        file.seek(self.offset * dtype.itemsize)
        raw = file.read(want)
    except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
      _raise_of_bucket(path, error)
      raise ValueError(f'{path} is truncated: {error}') from None
    if len(raw) != want:
      raise ValueError(f'{path} is truncated: {self.storage.member} is short')
    steps = tuple(step * dtype.itemsize for step in self.strides)
    flat = np.frombuffer(raw, np.uint8).view(dtype)
    strided = np.lib.stride_tricks.as_strided(flat, self.shape, steps)
    return np.ascontiguousarray(strided)


def _view(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> View:
  """Stands for torch's function that makes a tensor of a storage."""
  if not isinstance(storage, Storage):
    raise pickle.UnpicklingError('a tensor is of no storage')
  return View(storage, offset, tuple(shape), tuple(strides))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('torch._utils', '_rebuild_tensor_v2'): _view,
  ('torch._utils', '_rebuild_parameter'): lambda view, *_: view,
}


class _Reader(pickle.Unpickler):
  """Makes views; refuses every name that they are not made of."""

  prefix = ''

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a name in the pickle."""
    if module == 'torch' and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) in _ALLOWED:
      return _ALLOWED[module, name]
    raise pickle.UnpicklingError(f'{module}.{name} belongs to no plain tensor')

  def persistent_load(self, pid: Any) -> Storage:
    """A storage, which lies outside of the pickle."""
    kind, dtype, key, _, size = pid
    if kind != 'storage' or not (
      isinstance(dtype, str) and isinstance(key, str) and type(size) is int
    ):
      raise pickle.UnpicklingError(f'{kind!r} is no storage')
    return Storage(dtype, f'{self.prefix}/data/{key}', size)


def describe(path: Path) -> Any:
  """The contents of a file, with a `View` for each tensor.

  Raises:
    ValueError: it is damaged, old, or holds what is no tensor.
  """
  try:
    with (
      open_for_reading(path) as raw_file,
      zipfile.ZipFile(raw_file) as archive,
    ):
      (pickled,) = (n for n in archive.namelist() if n.endswith('/data.pkl'))
      if archive.getinfo(pickled).file_size > LARGEST:
        raise ValueError(f'{pickled} is larger than {LARGEST >> 20} MiB')
      with archive.open(pickled) as file:
        reader = _Reader(file)
        reader.prefix = pickled.removesuffix('/data.pkl')
        return reader.load()
  except zipfile.BadZipFile as error:
    raise ValueError(
      f'{path} is truncated or no torch file: {error}; one that is older than '
      "torch 1.6 is made new by python -c 'import sys, torch; "
      f"torch.save(torch.load(sys.argv[1]), sys.argv[1])' {path}"
    ) from None
  except Exception as error:
    _raise_of_bucket(path, error)
    raise ValueError(
      f'{path} is truncated or no torch file of plain tensors: '
      f'{str(error).splitlines()[0] if str(error) else type(error).__name__}'
    ) from None


def _raise_of_bucket(path: Path, error: Exception) -> None:
  """Raises an error of a bucket, which says nothing about the file in it."""
  if in_bucket(path) and isinstance(error, OSError):
    raise error
