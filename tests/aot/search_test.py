"""Which choices are tried, in what order they are shown, and when it stops."""

import dataclasses
import types

import pytest

from gated_jax.aot import search
from gated_jax.aot.report import DoesNotFit
from gated_jax.config import MoEConfig
from gated_jax.config import RunConfig

POD = [types.SimpleNamespace(device_kind='TPU v5 lite')] * 16
BASE = RunConfig()


def examined(config, devices, price):
  """Full recomputation fits four rows a device, anything else one."""
  remat, batch = config.model.remat, config.data.batch
  each = batch * config.mesh.tensor / len(devices)
  if remat == 'none':
    raise DoesNotFit('it does not fit')
  speed = 1000 * each / (1 + (remat == 'full')) / config.mesh.tensor
  return types.SimpleNamespace(
    excess=0 if each <= (4 if remat == 'full' else 1) else 5.0,
    tokens_per_second=speed,
    utilisation=speed / 1e4,
    compiled=types.SimpleNamespace(
      memory=types.SimpleNamespace(peak=each * 2**30), config=config
    ),
  )


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
  monkeypatch.setattr(search, 'examine', examined)
  monkeypatch.setattr(search.kernels, 'prices', lambda *what: None)


def test_what_fits_is_shown_with_its_flags_quickest_first():
  said = []
  found = search.search(BASE, POD, 60, said.append)
  speeds = [report.tokens_per_second for _, report in found]
  assert speeds == sorted(speeds, reverse=True)
  choice, report = found[0]
  # Four rows at half the speed beat one.
  assert (choice.mesh.tensor, choice.remat) == (1, 'full')
  assert report.compiled.config.data.batch == 4 * len(POD)
  _, first, *rest = search.table(found).splitlines()
  assert len(rest) == len(found) - 1
  assert first.split()[:3] == ['2,000', '20.0%', '4.00']
  assert '--config.mesh.fsdp=16' in first and '--config.data.batch=64' in first
  assert '--config.model.remat=full' in first
  # Nothing larger was tried than the first that was too large.
  assert sum('too large by 5 bytes' in line for line in said) == len(
    {(c.mesh.tensor, c.remat) for c, _ in found}
  )


def test_every_mesh_divides_pod_and_model():
  experts = dataclasses.replace(
    BASE.model,
    pattern=('attention+moe',),
    moe=MoEConfig(experts=12, top_k=2, width=64),
  )
  base = dataclasses.replace(BASE, model=experts)
  meshes = {
    tuple(choice.mesh.axes.values()) for choice in search.choices(base, 16)
  }
  sizes = {choice.mesh.expert for choice in search.choices(base, 16)}
  assert sizes == {1, 4}  # 8 and 16 do not divide 12 experts
  for data, fsdp, expert, context, tensor in meshes:
    assert data * fsdp * expert * context * tensor == 16


def test_it_stops_when_its_time_is_over():
  said = []
  assert search.search(BASE, POD, -1, said.append) == []
  assert said == ['stopped after -1 s: not everything was tried']
  assert search.table([]) == 'nothing that was tried fits'
