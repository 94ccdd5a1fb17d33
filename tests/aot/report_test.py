"""A program that the compiler refuses is explained in one line."""

import jax
import numpy as np
import pytest

from gated_jax import chips
from gated_jax.aot import report
from gated_jax.config import RunConfig

V5E = chips.TPUS['v5e']


@pytest.mark.parametrize(
  ('message', 'explained'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.25G '
      'of 15.75G hbm.',
      'it does not fit: 19.25 GiB needed per device, 15.75 GiB on v5e, 3.50 GiB '
      'too much',
    ),
    (
      'RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory '
      'in memory space vmem while allocating for %filter. 20.53M of 16.00M.',
      'a kernel or fusion overruns the VMEM of v5e: RESOURCE_EXHAUSTED: E1001: '
      'CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while '
      'allocating for %filter. 20.53M of 16.00M.',
    ),
  ],
)
def test_which_memory_was_too_small_is_told(message, explained, monkeypatch):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(report, 'chip_of', lambda devices: V5E)
  monkeypatch.setattr(report, 'compile_step', refuse)
  with pytest.raises(report.DoesNotFit) as refusal:
    report.examine(RunConfig(), np.empty(0))
  assert str(refusal.value) == explained
