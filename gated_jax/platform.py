"""What the TPU's compiler is told, and where there is no TPU to look for.

Where libtpu is installed and no TPU is there, looking for one prints alarming
lines. Programs call `skip_absent_tpu` before they touch a device; libraries do
not.
"""

import glob
import importlib.util
import os
import pathlib

import jax

GOOGLE = '0x1ae0'  # as PCI vendor

# Gathers beside computing: by itself v6e's compiler waits for each of them, and
# v5p's makes them all-reduces of zeros, of twice the bytes.
OVERLAP = {
  'xla_enable_async_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
  'xla_tpu_prefer_async_allgather_to_allreduce': 'true',
}
# More of the fast memory for a product's own tiles: it then reads its operands
# seldom enough to be bound by the matrix units. The rest holds whole arrays.
TILES_KIB = {'TPU v5 lite': 40960, 'TPU v5': 32768, 'TPU v6 lite': 40960}


def compiler_options(kind: str) -> dict[str, str] | None:
  """Of programs for whole models; by a device's `device_kind`."""
  if kind not in TILES_KIB:
    return None
  return {'xla_tpu_scoped_vmem_limit_kib': str(TILES_KIB[kind]), **OVERLAP}


def has_tpu_chip() -> bool:
  """Whether this machine has, or is told of, TPU chips."""
  told = ('TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES', 'TPU_NAME')
  if any(os.environ.get(name) for name in told) or glob.glob('/dev/accel*'):
    return True
  vendors = pathlib.Path('/sys/bus/pci/devices').glob('*/vendor')
  return any(path.read_text().strip() == GOOGLE for path in vendors)


def skip_absent_tpu() -> None:
  """Leaves only the CPU to be found where libtpu is all else there is."""
  others = ('jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
  known = any(importlib.util.find_spec(name) for name in others)
  if getattr(jax.config, 'jax_platforms', '') or known or has_tpu_chip():
    return
  if importlib.util.find_spec('libtpu'):
    jax.config.update('jax_platforms', 'cpu')
