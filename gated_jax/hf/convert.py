"""Parameters from a Hugging Face folder, and into one.

    config, params = load('path/of/a/checkpoint', mesh)
    save('path/of/a/new/folder', params, config)

`load` reads every tensor once, writes it into the parts of the parameters
that this process's devices hold, and places one parameter at a time: beside
the model, memory holds the largest parameter and one tensor. `save` holds
one shard. Files are read and written by `gated_jax/hf/files.py`, names and
layouts are the tables in `gated_jax/hf/families/`.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.experimental import multihost_utils

from gated_jax.config import ModelConfig
from gated_jax.hf import inventory
from gated_jax.hf.config import choose_family
from gated_jax.hf.config import family_named
from gated_jax.hf.config import find_family
from gated_jax.hf.config import read_config
from gated_jax.hf.config import write_config
from gated_jax.hf.files import DTYPES
from gated_jax.hf.files import TensorFiles
from gated_jax.hf.files import read_json
from gated_jax.hf.files import write_json
from gated_jax.hf.files import write_tensors
from gated_jax.hf.names import Shape
from gated_jax.hf.names import Tensor
from gated_jax.hf.names import tensors
from gated_jax.hf.new_folder import check_free
from gated_jax.hf.new_folder import whole_folder
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.size import check_fits
from gated_jax.paths import Path
from gated_jax.paths import expand

Tree = Any
# Bytes of one file, as transformers writes them.
SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 64  # bytes; XLA's arrays on a CPU begin at multiples of it


def flatten(tree: Tree) -> dict[str, Any]:
  """Path with slashes to leaf."""
  return traverse_util.flatten_dict(meta.unbox(tree), sep='/')


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """The inverse."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def shapes_of(tree: Tree) -> dict[str, Shape]:
  """Path with slashes to shape."""
  return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def load(
  folder: str | os.PathLike[str],
  mesh: jax.sharding.Mesh | None = None,
  param_dtype: str = '',
  ignore: Sequence[str] = (),
  say: Callable[[str], object] = lambda _: None,
) -> tuple[ModelConfig, Tree]:
  """The model in a folder of Hugging Face's form.

  Args:
    folder: With config.json and weights.
    mesh: Where parameters are placed; None: on the first device.
    param_dtype: They are kept in; '': as in the files, and float32 where
      those hold float16 or a mixture. Parameters that the model always keeps
      in float32 have no say.
    ignore: Keys of config.json, and patterns of tensors, to pass over.
    say: Is told which tensors are passed over, and that they are.

  Raises:
    ValueError: something is missing, damaged, of the wrong shape, not known,
      or beyond what the decoder computes; the message names it.
  """
  folder = expand(folder)
  values = read_json(folder / 'config.json')
  family = find_family(values)
  files = TensorFiles(folder)
  config = read_config(values, family, ignore, files.shapes.values())
  some = 'bfloat16' in files.dtypes.values()
  kept = param_dtype or ('bfloat16' if some else 'float32')
  config = dataclasses.replace(config, param_dtype=kept)
  devices = jax.devices() if mesh is None else mesh.devices.flat
  check_fits(config, list(devices))
  abstract = flatten(abstract_parameters(config, mesh))
  shapes = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
  wanted = inventory.listed(family, config, shapes, files)
  aside = inventory.set_aside(family, config, ignore)
  for line in inventory.check(wanted, files, family, aside):
    say(line)
  if not param_dtype and not inventory.all_narrow(wanted, abstract, files):
    config = dataclasses.replace(config, param_dtype='float32')
    check_fits(config, list(devices))
    abstract = flatten(abstract_parameters(config, mesh))
  arrays: dict[str, jax.Array] = {}
  # All layers of one parameter, or of those that share tensors, together.
  wanted.sort(key=lambda tensor: tensor.leaves)
  for leaves, group in itertools.groupby(wanted, lambda t: t.leaves):
    places = {leaf: abstract[leaf] for leaf in leaves}
    arrays |= _assemble(places, group, files)
  return config, unflatten(arrays)


def _assemble(
  places: Mapping[str, jax.ShapeDtypeStruct],
  group: Iterable[Tensor],
  files: TensorFiles,
) -> dict[str, jax.Array]:
  """Parameters, from the tensors that hold them."""
  # Replicas have the same index: they are filled once.
  buffers = {leaf: _buffers(place) for leaf, place in places.items()}
  for tensor in group:
    _distribute(tensor, files.read(tensor.name), buffers)
  return {leaf: _placed(place, buffers[leaf]) for leaf, place in places.items()}


def _distribute(
  tensor: Tensor,
  array: np.ndarray,
  buffers: Mapping[str, Mapping['Spans', np.ndarray]],
) -> None:
  """Copies a tensor of theirs into the parts of the parameters that it holds.

  It is a function of its own so that nothing holds the array when it is done.
  """
  for leaf, part in zip(tensor.leaves, tensor.split(array), strict=True):
    for spans, buffer in buffers[leaf].items():
      _fill(buffer, spans, tensor.at, part)


def _placed(place: jax.ShapeDtypeStruct, parts: dict[Any, Any]) -> jax.Array:
  array = jax.make_array_from_callback(
    place.shape,
    place.sharding,
    lambda index: parts[_spans(index, place.shape)],
  )
  parts.clear()  # the array itself holds what it still needs
  return array


Spans = tuple[tuple[int, int], ...]


def _spans(index: Any, shape: Shape) -> Spans:
  return tuple(
    part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
  )


def _buffers(place: jax.ShapeDtypeStruct) -> dict[Spans, np.ndarray]:
  """Room for each part of a parameter that devices here hold."""
  indices = place.sharding.addressable_devices_indices_map(place.shape)
  distinct = {_spans(index, place.shape) for index in indices.values()}
  return {
    spans: _aligned([end - begin for begin, end in spans], place.dtype)
    for spans in distinct
  }


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """An empty array that a CPU device takes as it is, without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  begin = -raw.ctypes.data % _ALIGNMENT
  return raw[begin : begin + size].view(dtype).reshape(shape)


def _fill(
  buffer: np.ndarray, spans: Spans, index: tuple[int, ...], part: np.ndarray
) -> None:
  """Copies what falls into a buffer of a parameter's part at an index."""
  where: list[Any] = []
  for (begin, end), i in zip(spans, index, strict=False):
    if not begin <= i < end:
      return
    where.append(i - begin)
  cut = tuple(slice(begin, end) for begin, end in spans[len(index) :])
  buffer[(*where, ...)] = part[cut]


def save(
  folder: str | os.PathLike[str],
  params: Tree,
  config: ModelConfig,
  family: str = '',
  dtype: str = '',
  shard_bytes: int = SHARD_BYTES,
  more: Callable[[pathlib.Path], None] = lambda _: None,
) -> None:
  """Writes a folder that transformers loads, whole or not at all.

  Where there are several processes, all call it and the first one writes. What
  it can refuse beforehand is raised in all of them.

  Args:
    folder: New, or empty.
    params: Arrays of any placement, or NumPy's.
    config: Of the model.
    family: A name in `gated_jax/hf/families/`; '': the first that can
      describe the model.
    dtype: Tensors are stored in; '': each in that of its parameters.
    shard_bytes: A file's size at most, but for a tensor that is larger.
    more: Writes what else belongs into the folder, before it is complete.

  Raises:
    ValueError: the family cannot describe the model, a parameter is not the
      config's, or the folder cannot be written.
  """
  kind = family_named(family) if family else choose_family(config)
  if dtype not in ('', *DTYPES):
    raise ValueError(f'{dtype=} must be one of {", ".join(DTYPES)}')
  most = dtype or config.param_dtype
  values = write_config(config, kind) | {'torch_dtype': most}
  flat = flatten(params)
  shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
  _check_shapes(shapes, shapes_of(abstract_parameters(config)))
  listed = {t.name: t for t in tensors(kind.rows, config, shapes)}

  def read(name: str) -> np.ndarray:
    """A tensor as the other side stores it, joined from its arrays."""
    tensor = listed[name]
    return tensor.join([get(flat[x], tensor.at) for x in tensor.leaves])

  folder = expand(folder)
  agree_on(folder)
  if jax.process_index() != 0:
    for name in listed:
      read(name)  # the first process needs the parts that are here
    return
  with whole_folder(folder) as (partial, send):
    sizes = [(name, tensor.shape) for name, tensor in listed.items()]
    dtypes = {
      name: dtype or str(flat[tensor.leaves[0]].dtype)
      for name, tensor in listed.items()
    }
    write_tensors(partial, sizes, read, dtypes, shard_bytes, send)
    write_json(partial / 'config.json', values)
    more(partial)


def agree_on(folder: Path) -> None:
  """ValueError in every process where the first one finds the folder taken.

  Else the others would wait for its part of a parameter.
  """
  message = ''
  if jax.process_index() == 0:
    try:
      check_free(folder)
    except ValueError as error:
      message = str(error)
  if jax.process_count() > 1:
    taken = multihost_utils.broadcast_one_to_all(np.array(bool(message)))
    if taken and not message:
      message = f'the first process finds that {folder} exists'
  if message:
    raise ValueError(message)


def get(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
  """One layer of a parameter, or one expert, on the host."""
  part = leaf[index]
  if isinstance(part, jax.Array) and not part.is_fully_addressable:
    part = multihost_utils.process_allgather(part, tiled=True)
  return np.asarray(part)


def _check_shapes(
  found: Mapping[str, Shape], expected: Mapping[str, Shape]
) -> None:
  for path in sorted({*found, *expected}):
    if found.get(path) != expected.get(path):
      raise ValueError(
        f'the parameter {path} is {found.get(path, "absent")}, and the config '
        f'makes it {expected.get(path, "absent")}'
      )
