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

# What the compiler is told about a model's programs, by `device_kind`. More of
# the fast memory for a product's own tiles: it then reads its operands seldom
# enough to be bound by the matrix units; the rest holds whole arrays. On v5e,
# where gathers run beside products, that all should: small ones became
# all-reduces of zeros. docs/tpu.md says why v5p and v6e have no such option.
TILES = 'xla_tpu_scoped_vmem_limit_kib'
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
  'TPU v5 lite': {
    TILES: '40960',
    'xla_tpu_prefer_async_allgather_to_allreduce': 'true',
  },
  'TPU v5': {TILES: '32768'},
  'TPU v6 lite': {TILES: '40960'},
}


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
