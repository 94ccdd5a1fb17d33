"""Products of groups of rows with a matrix for each group."""

import functools

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from gated_jax.ops.moe import tiles

NAMES = ('ragged_dot', 'gmm', 'tiles')


def resolve(implementation: str) -> str:
  """The implementation by its name; 'auto' is the best of this platform.

  'gmm' is JAX's grouped-matmul kernel for TPU. It is the automatic choice
  there: the compiler turns the weight gradient of `ragged_dot` into a dense
  matmul of every expert with every row, E times the work. On a CPU it does so
  with the product itself, where 'tiles' (tiles.py) computes what is asked for.

  Raises:
    ValueError: there is no such implementation.
  """
  if implementation == 'auto':
    best = {'tpu': 'gmm', 'cpu': 'tiles'}
    return best.get(jax.default_backend(), 'ragged_dot')
  if implementation not in NAMES:
    raise ValueError(
      f'implementation={implementation!r} must be one of: auto, '
      + ', '.join(NAMES)
    )
  return implementation


def check_platform(implementation: str, platform: str) -> None:
  """NotImplementedError where a grouped matmul cannot run."""
  if implementation == 'gmm' and platform != 'tpu':
    raise NotImplementedError(
      f'moe.implementation={implementation!r} needs a TPU and this is a '
      f'{platform}'
    )


def row_tile(implementation: str, rows: int) -> int:
  """Rows that the kernel takes at once; every buffer is a multiple."""
  if resolve(implementation) != 'gmm':
    return 1
  return 512 if rows >= 4096 else 128


def _tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
  """Tiles of the kernel: as wide as VMEM holds beside two buffers."""

  def widest(size: int, most: int) -> int:
    """The fewest equal parts below `most`, in whole lanes."""
    parts = -(-size // most)
    return min(size, -(-size // parts // 128) * 128)

  return (512 if m % 512 == 0 else 128, widest(k, 1024), widest(n, 1024))


def grouped_matmul(
  rows: Float[Array, 'R D'],
  matrices: Float[Array, 'E D F'],
  sizes: Int[Array, ' E'],
  implementation: str = 'auto',
  interpret: bool = False,
  start: Float[Array, 'E D F'] | None = None,
  turned: bool = False,
) -> Float[Array, 'R F']:
  """The first sizes[0] rows times matrices[0], the next times matrices[1], ..

  Rows past the last group come out as anything, as the kernel leaves them.

  Args:
    rows: sorted by group.
    matrices: one for each group.
    sizes: rows of each group.
    implementation: 'auto', or one of NAMES.
    interpret: runs 'gmm' on a CPU, for tests.
    start: what the gradient of the matrices is added to, that of earlier rows.
    turned: the matrices, and their gradient, are [E, F, D]; 'gmm' alone.
  """
  name = resolve(implementation)
  if name == 'gmm':
    return _kernel(rows, matrices, sizes, start, (turned, interpret))
  if start is not None:
    matrices = _adding_to(matrices, start)
  if name == 'tiles':
    return tiles.product(rows, matrices, sizes)
  return jax.lax.ragged_dot(
    rows, matrices, sizes, preferred_element_type=rows.dtype
  )


@jax.custom_vjp
def _adding_to(matrices: Array, start: Array) -> Array:
  """The matrices; their gradient begins with `start`."""
  del start
  return matrices


_adding_to.defvjp(
  lambda matrices, start: (matrices, start),
  lambda start, grad: (start + grad, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel(
  rows: Array,
  matrices: Array,
  sizes: Array,
  start: Array | None,
  options: tuple[bool, bool],
) -> Array:
  """The product by JAX's kernel. In backward the kernel adds to `start`."""
  del start
  turned, interpret = options
  return gmm(
    rows,
    matrices,
    sizes,
    rows.dtype,
    _tiling,
    transpose_rhs=turned,
    interpret=interpret,
  )


def _kernel_backward(
  options: tuple[bool, bool], saved: tuple, grad: Array
) -> tuple[Array, Array, None, None]:
  rows, matrices, sizes, start = saved
  turned, interpret = options
  d_rows = gmm(
    grad,
    matrices,
    sizes,
    rows.dtype,
    _tiling,
    transpose_rhs=not turned,
    interpret=interpret,
  )
  left, right = (grad, rows) if turned else (rows, grad)
  d_matrices = tgmm(
    left.swapaxes(0, 1),
    right,
    sizes,
    matrices.dtype,
    _tiling,
    num_actual_groups=matrices.shape[0],
    existing_out=start,
    interpret=interpret,
  )
  return d_rows, d_matrices, None, None


_kernel.defvjp(
  lambda rows, matrices, sizes, start, options: (
    _kernel(rows, matrices, sizes, start, options),
    (rows, matrices, sizes, start),
  ),
  _kernel_backward,
)
