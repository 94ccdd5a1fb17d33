"""JAX is kept from looking for a TPU exactly where there is none."""

import importlib.util
import types

import jax
import pytest

from gated_jax import platform

NAMED = {'TPU_NAME': 'pod'}


@pytest.mark.parametrize(
  ('installed', 'environment', 'platforms', 'cpu_only'),
  [
    (('libtpu',), {}, '', True),
    (('libtpu',), NAMED, '', False),
    (('libtpu', 'jax_cuda12_plugin'), {}, '', False),
    (('libtpu',), {}, 'tpu', False),
    ((), {}, '', False),
  ],
)
def test_only_an_absent_tpu_is_skipped(
  installed, environment, platforms, cpu_only, monkeypatch, tmp_path
):
  for name in ('TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES', 'TPU_NAME'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(platform.glob, 'glob', lambda pattern: [])
  monkeypatch.setattr(platform.pathlib, 'Path', lambda path: tmp_path)
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: name in installed or None
  )
  updates = []
  config = types.SimpleNamespace(
    jax_platforms=platforms, update=lambda *change: updates.append(change)
  )
  monkeypatch.setattr(jax, 'config', config)
  platform.skip_absent_tpu()
  assert updates == ([('jax_platforms', 'cpu')] if cpu_only else [])


def test_a_chip_is_known_by_its_vendor(monkeypatch, tmp_path):
  for name in ('TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES', 'TPU_NAME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(platform.glob, 'glob', lambda pattern: [])
  monkeypatch.setattr(platform.pathlib, 'Path', lambda path: tmp_path)
  (tmp_path / '0').mkdir()
  vendor = tmp_path / '0' / 'vendor'
  vendor.write_text('0x10de\n')
  assert not platform.has_tpu_chip()
  vendor.write_text(platform.GOOGLE + '\n')
  assert platform.has_tpu_chip()


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError('no\nplugin')]
)
def test_a_platform_that_is_not_there_is_refused_in_one_line(
  error, monkeypatch
):
  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  with pytest.raises(ValueError, match='gives no devices: no plugin') as found:
    platform.check_devices()
  assert '\n' not in str(found.value)
