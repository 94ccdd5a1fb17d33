"""Keeps JAX from looking for a TPU on machines that have none.

Where libtpu is installed without a TPU, looking for one prints alarming lines.
Programs call `skip_absent_tpu` before they touch a device; libraries do not.
"""

import glob
import importlib.util
import os
import pathlib

import jax

GOOGLE = '0x1ae0'  # Google's number as a PCI vendor


def has_tpu_chip() -> bool:
  """Tells whether this machine has TPU chips, or its environment names some."""
  variables = ('TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES', 'TPU_NAME')
  if any(os.environ.get(name) for name in variables) or glob.glob(
    '/dev/accel*'
  ):
    return True
  vendors = pathlib.Path('/sys/bus/pci/devices').glob('*/vendor')
  return any(path.read_text().strip() == GOOGLE for path in vendors)


def skip_absent_tpu() -> None:
  """Makes JAX use the CPU where libtpu is installed and no TPU is there.

  An explicit choice of platform and GPU plugins are left alone.
  """
  others = ('jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
  known = any(importlib.util.find_spec(name) for name in others)
  if getattr(jax.config, 'jax_platforms', '') or known or has_tpu_chip():
    return
  if importlib.util.find_spec('libtpu'):
    jax.config.update('jax_platforms', 'cpu')


def check_devices() -> None:
  """ValueError in one line where the platform that was asked for is not there.

  It looks for devices, so several processes have to be joined before. JAX
  itself reports a missing plugin by a failed assertion.
  """
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    asked = getattr(jax.config, 'jax_platforms', '') or ''
    reason = (
      ' '.join(str(error).split())[:200] or 'no plugin for it is installed'
    )
    raise ValueError(
      f'JAX_PLATFORMS={asked!r} gives no devices: {reason}'
    ) from error
