"""What cannot fit is refused, and what can is not."""

import jax
import numpy as np
import pytest

from gated_jax import memory


def test_bytes_are_those_of_the_arrays():
  tree = {
    'a': np.zeros((3, 5), np.float32),
    'b': jax.ShapeDtypeStruct((10**6, 10**6), jax.numpy.bfloat16),
  }
  assert memory.size_of(tree) == 60 + 2 * 10**12


def test_a_machine_has_some_memory_but_not_all():
  devices = jax.devices()
  assert memory.GIB < memory.of_devices(devices) < 2**50
  # Forced devices of one host share what it has.
  assert memory.of_devices(devices) == memory.of_devices(devices[:1])
  memory.check('small arrays', 10**6, devices)
  with pytest.raises(ValueError, match=r'model.depth=9 need 1,048,576.0 GiB'):
    memory.check('the parameters of model.depth=9', 2**50, devices)


def test_a_container_may_have_less(tmp_path, monkeypatch):
  limit = tmp_path / 'memory.max'
  monkeypatch.setattr(memory, '_CONTAINER', (str(limit), '/no/such/file'))
  whole = memory.of_host()
  limit.write_text('max\n')
  assert memory.of_host() == whole
  limit.write_text('1000000\n')
  assert memory.of_host() == 10**6


def test_devices_that_do_not_tell_are_not_judged():
  class Device:
    platform, device_kind, process_index = 'tpu', 'TPU', 0

    def memory_stats(self):
      return None

  memory.check('anything', 2**60, [Device()])
