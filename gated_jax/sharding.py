"""Places of arrays: the mesh, and one table from logical axes to its axes.

Layers name the axes of what they make by meaning ('batch', 'heads'); `RULES`
says which mesh axes each of them is split over, and everything else follows:
parameters and optimizer state (`shardings`), batches (`batch_sharding`),
activations (`constrain`), and what a kernel sees (`per_device`). XLA's
partitioner does the rest.

    data      copies of the model; slow networks between slices belong here
    fsdp      parameters and optimizer state are split, and gathered for use
    expert    experts are split, tokens travel to them
    context   the sequence is split
    tensor    heads, MLP and vocabulary are split
"""

import contextlib
import contextvars
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from gated_jax import torus
from gated_jax.config import MeshConfig

# Logical axes of one array; None is an axis that is never split.
Axes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'length': ('context',),
  # Sequence axis of the residual stream. Outside tensor-parallel matmuls it is
  # also split over `tensor` (sequence parallelism), or every tensor device
  # would repeat the norms of the same tokens.
  'residual_length': ('context', 'tensor'),
  'kv_length': (),
  'layers': (),
  # The width axis of parameters. An activation's width is never split; its
  # axis is None.
  'embed': ('fsdp', 'expert', 'context'),
  'expert_embed': ('fsdp', 'context'),  # used where 'expert' splits the experts
  'experts': ('expert',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
}
# Axes of the residual stream, and of matmul inputs and outputs of its width.
RESIDUAL: Axes = ('batch', 'residual_length', None)
# More devices than kv heads: each of them then holds every kv head, and takes
# the one that its query heads read.
REPEATED = ('kv_heads',)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of a config over devices (default: all of this run).

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = _fill(config, len(devices))
  shape = tuple(sizes.values())
  if config.slices == 1:
    on_torus = devices[0].platform == 'tpu'
    grid = _on_torus(sizes, devices) if on_torus else np.array(devices)
    return Mesh(grid.reshape(shape), tuple(sizes))
  outer = sizes[config.slice_axis]
  if outer % config.slices:
    raise ValueError(
      f'mesh.{config.slice_axis}={outer} must be a multiple of '
      f'mesh.slices={config.slices}'
    )
  slow = dict.fromkeys(sizes, 1) | {config.slice_axis: config.slices}
  fast = {name: sizes[name] // slow[name] for name in sizes}
  grid = _hybrid(tuple(fast.values()), tuple(slow.values()), devices)
  return Mesh(grid, tuple(sizes))


def _on_torus(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
  """Devices in the mesh's order: neighbours along its inner axes.

  Experts that nothing else divides get compact blocks (see torus.py); all
  other meshes are JAX's own.
  """
  if sizes['expert'] > 1 and sizes['context'] == sizes['tensor'] == 1:
    blocks = torus.in_blocks(devices, sizes['expert'])
    if blocks is not None:
      return blocks
  return mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )


def _hybrid(
  fast: tuple[int, ...], slow: tuple[int, ...], devices: list[Any]
) -> np.ndarray:
  """Slices outermost on their axis; devices that know none go in order."""
  if getattr(devices[0], 'slice_index', None) is not None:
    return mesh_utils.create_hybrid_device_mesh(
      fast, slow, devices, allow_split_physical_axes=True
    )
  grid = np.array(devices).reshape(slow + fast)
  order = [axis for i in range(len(fast)) for axis in (i, i + len(fast))]
  shape = [a * b for a, b in zip(slow, fast, strict=True)]
  return grid.transpose(order).reshape(shape)


def _fill(config: MeshConfig, devices: int) -> dict[str, int]:
  sizes = dict(config.axes)
  known = math.prod(size for size in sizes.values() if size != -1)
  shown = ' x '.join(f'{name} {size}' for name, size in sizes.items())
  for name, size in sizes.items():
    if size == -1:
      if devices % known:
        raise ValueError(
          f'mesh {shown}: {known} does not divide {devices} devices, so '
          f'mesh.{name} cannot take what is left'
        )
      sizes[name] = devices // known
  if math.prod(sizes.values()) != devices:
    raise ValueError(
      f'mesh {shown} makes {math.prod(sizes.values())}, and there are '
      f'{devices} devices'
    )
  return sizes


# The mesh that the trainer was given. A mesh that somebody else's program has
# set in JAX is none of this package's business, whatever its axes are called.
_active: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
  'gated_jax_mesh', default=None
)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[Mesh]:
  """Inside, `constrain` and `per_device` mean this mesh."""
  token = _active.set(mesh)
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _active.reset(token)


@contextlib.contextmanager
def inactive() -> Iterator[None]:
  """Inside, no mesh is meant: shapes are those of a single device."""
  token = _active.set(None)
  try:
    yield
  finally:
    _active.reset(token)


def is_active() -> bool:
  """Tells whether arrays are placed by this module at all."""
  return _active.get() is not None


def _sizes() -> dict[str, int]:
  """Axes of the active mesh; empty without one."""
  mesh = _active.get()
  return {} if mesh is None else dict(mesh.shape)


def is_split() -> bool:
  """Tells whether the active mesh has more than one device."""
  return any(size > 1 for size in _sizes().values())


def axis_size(name: str) -> int:
  """How many parts the active mesh splits a logical axis into."""
  sizes = _sizes()
  return math.prod(sizes.get(axis, 1) for axis in RULES[name])


def mesh_axes(name: str) -> tuple[str, ...]:
  """Axes of the active mesh that split a logical axis, the trivial left out."""
  sizes = _sizes()
  return tuple(axis for axis in RULES[name] if sizes.get(axis, 1) > 1)


def spec_of(
  sizes: dict[str, int], axes: Axes, shape: tuple[int, ...], what: str
) -> PartitionSpec:
  """The partition of one array.

  Args:
    sizes: of the mesh axes.
    axes: the array's logical axes.
    shape: its shape.
    what: the array's name, for messages.

  Raises:
    ValueError: a mesh axis would be used twice, or does not divide.
  """
  if len(axes) != len(shape):
    raise ValueError(f'{what} of shape {shape} has axes {axes}')
  entries: list[Any] = []
  used: dict[str, str | None] = {}
  for name, size in zip(axes, shape, strict=True):
    split = [a for a in RULES[name] if sizes.get(a, 1) > 1] if name else []
    parts = math.prod(sizes[a] for a in split)
    if size % parts and name in REPEATED and parts % size == 0:
      split = []
    elif size % parts:
      raise ValueError(
        f'{what} of shape {shape}: {name} has {size} entries, which mesh axes '
        f'{" x ".join(f"{a} {sizes[a]}" for a in split)} do not divide'
      )
    for axis in split:
      if axis in used:
        raise ValueError(
          f'{what} of shape {shape}: mesh axis {axis} of size {sizes[axis]} '
          f'would split both {used[axis]} and {name}'
        )
      used[axis] = name
    entries.append(tuple(split) if len(split) > 1 else (*split, None)[0])
  return PartitionSpec(*entries)


def shardings(mesh: Mesh, boxed: Any) -> Any:
  """The sharding of every parameter of an abstract, boxed tree.

  Args:
    mesh: from `make_mesh`.
    boxed: `jax.eval_shape(model.init, ...)['params']`, whose leaves carry
      their logical axes; what has none is not split.
  """

  def place(path: Any, leaf: Any) -> NamedSharding:
    """The place of one array."""
    if not isinstance(leaf, meta.Partitioned):
      return NamedSharding(mesh, PartitionSpec())
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = spec_of(dict(mesh.shape), leaf.names, leaf.value.shape, name)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    place, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The place of rows of tokens [B, T]."""
  sizes = dict(mesh.shape)

  def split(name: str) -> tuple[str, ...] | None:
    """The mesh axes that really split a logical axis."""
    return tuple(a for a in RULES[name] if sizes[a] > 1) or None

  return NamedSharding(mesh, PartitionSpec(split('batch'), split('length')))


def check_batch(
  mesh: Mesh, batch: int, length: int, accumulate: int = 1
) -> None:
  """ValueError where rows of tokens cannot be split over the mesh.

  Args:
    mesh: from `make_mesh`.
    batch: rows of one step.
    length: tokens of a row; each device takes one chunk from its beginning
      and one from its end, so that causal work is even.
    accumulate: parts that the batch is worked through in.
  """
  sizes = dict(mesh.shape)

  def check(what: str, size: int, name: str, pieces: int, why: str) -> None:
    """Refuses a size that the mesh cannot divide into whole pieces."""
    split = [axis for axis in RULES[name] if sizes[axis] > 1]
    parts = math.prod(sizes[axis] for axis in split)
    if parts > 1 and size % (parts * pieces):
      shown = ' x '.join(f'{axis} {sizes[axis]}' for axis in split)
      raise ValueError(
        f'{what}={size} must be a multiple of {parts * pieces}: mesh '
        f'{shown}{why}'
      )

  parts_of_batch = f', optimizer.accumulate {accumulate}'
  check(
    'data.batch',
    batch,
    'batch',
    accumulate,
    parts_of_batch if accumulate > 1 else '',
  )
  check('data.length', length, 'length', 2, ', two chunks for each')


def _lenient(axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
  """Like `spec_of`, but an axis that does not divide is left whole."""
  sizes = _sizes()
  entries: list[Any] = []
  for name, size in zip(axes, shape, strict=True):
    split = tuple(a for a in RULES[name] if sizes.get(a, 1) > 1) if name else ()
    whole = size % math.prod(sizes[a] for a in split)
    entries.append(None if whole or not split else split)
  return PartitionSpec(*entries)


def parts(name: str, size: int) -> int:
  """The parts that `per_device` splits an axis into: all, or it stays whole."""
  count = axis_size(name)
  return 1 if size % count else count


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Tells the partitioner where an activation lies; nothing without a mesh.

  One that does not divide (a single prompt, say) is not split.
  """
  if not is_split():
    return x
  return jax.lax.with_sharding_constraint(x, _lenient(axes, x.shape))


def per_device(
  function: Callable[..., Any], inputs: Sequence[Any], outputs: Any
) -> Callable[..., Any]:
  """`function` on each device's shard: kernels cannot be partitioned.

  Args:
    function: of positional arrays; may use collectives over `mesh_axes`.
    inputs: logical axes of each argument. Where an argument is None, so may
      its axes be.
    outputs: logical axes of what it returns, in the same tree.

  Returns:
    The function over whole arrays; without a mesh, `function` itself.
  """
  if not is_split():
    return function

  def is_axes(x: Any) -> bool:
    """A tuple of axis names is a leaf and no subtree."""
    return isinstance(x, tuple) and all(
      isinstance(a, str) or a is None for a in x
    )

  def whole(*arrays: Any) -> Any:
    """Runs the function on each device's shards."""
    split = _divided(arrays, inputs)

    def spec(axes: Axes) -> PartitionSpec:
      """The mesh axes of an array, where they divide it."""
      return PartitionSpec(*(split.get(name) for name in axes))

    in_specs = tuple(
      None if x is None else spec(axes)
      for x, axes in zip(arrays, inputs, strict=True)
    )
    out_specs = jax.tree.map(spec, outputs, is_leaf=is_axes)
    return jax.shard_map(
      function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*arrays)

  return whole


def _divided(
  arrays: Sequence[Any], axes: Sequence[Axes]
) -> dict[str | None, tuple[str, ...]]:
  """Mesh axes of each logical axis that they divide in all of the arrays.

  A batch may be too small for the mesh: every device then has all of it.
  """
  split: dict[str | None, tuple[str, ...]] = {}
  for x, names in zip(arrays, axes, strict=True):
    for name, size in zip(names, () if x is None else x.shape, strict=False):
      if name:
        parts = mesh_axes(name)
        whole = size % axis_size(name) or split.get(name) == ()
        split[name] = () if whole else parts
  return {name: parts for name, parts in split.items() if parts}
