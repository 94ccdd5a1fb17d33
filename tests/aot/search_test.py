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


# Rows of a device that fit, by what is recomputed, and its speed.
ROOM = {'none': (0, 0), 'minimal': (1, 1000), 'attention': (2, 800)}
ROOM |= {'exchange': (2, 850), 'full': (4, 500)}


def examined(config, devices, price):
  """As if it were compiled; rows in parts need memory one after the other."""
  data, parts = config.data, config.optimizer.accumulate
  each = data.batch * config.mesh.tensor / len(devices)
  most, speed = ROOM[config.model.remat]
  if not most:
    raise DoesNotFit('it does not fit')
  speed *= (1 if parts == 1 else 0.9) * each / config.mesh.tensor
  return types.SimpleNamespace(
    excess=0 if each / parts <= most else 5.0,
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


def run(base, **options):
  """What was ranked, and what was tried in its order."""
  said = []
  ranked = search.search(base, POD, 60, said.append, **options)
  tried = [
    tuple(
      line.partition(f'{name}=')[2].split()[0].rstrip(':')
      for name in ('tensor', 'remat', 'batch', 'accumulate')
    )
    for line in said
  ]
  return ranked, tried


def test_what_fits_is_shown_with_its_flags_quickest_first():
  ranked, _ = run(BASE)
  speeds = [report.tokens_per_second for _, report in ranked]
  assert speeds == sorted(speeds, reverse=True)
  # Four rows at half the speed beat two at four fifths.
  choice, report = ranked[0]
  assert (choice.mesh.tensor, choice.remat) == (1, 'full')
  assert report.compiled.config.data.batch == choice.batch == 4 * len(POD)
  _, first, *rest = search.table(ranked).splitlines()
  assert len(rest) == len(ranked) - 1
  assert first.split()[:3] == ['2,000', '20.0%', '4.00']
  assert '--config.mesh.fsdp=16' in first and '--config.data.batch=64' in first
  assert '--config.model.remat=full' in first


def test_what_recomputes_more_is_tried_where_less_does_not_fit():
  _, tried = run(BASE)
  assert [choice[1:3] for choice in tried if choice[0] == '1'] == [
    ('minimal', '16'),
    ('none', '16'),
    ('minimal', '32'),
    ('attention', '32'),
    ('minimal', '64'),
    ('attention', '64'),
    ('full', '64'),
    ('minimal', '128'),
    ('attention', '128'),
    ('full', '128'),
  ]


def test_the_same_batch_comes_in_parts_too():
  base = dataclasses.replace(
    BASE, data=dataclasses.replace(BASE.data, batch=64)
  )
  ranked, tried = run(base, same_batch=True)
  assert {batch for _, _, batch, _ in tried} == {'64'}
  assert [choice[1::2] for choice in tried if choice[0] == '1'] == [
    ('minimal', '1'),
    ('minimal', '2'),
    ('minimal', '4'),
    ('attention', '1'),
  ]
  assert ranked[0][0].accumulate == 4


def test_where_experts_are_split_their_rows_may_be_saved():
  model = dataclasses.replace(
    BASE.model,
    pattern=('attention+moe',),
    moe=MoEConfig(experts=4, top_k=2, width=64),
  )
  data = dataclasses.replace(BASE.data, batch=32)
  base = dataclasses.replace(BASE, model=model, data=data)
  ranked, _ = run(base, same_batch=True)
  best = {choice.mesh.expert: choice.remat for choice, _ in reversed(ranked)}
  assert best == {4: 'minimal', 2: 'minimal', 1: 'minimal'}
  assert 'exchange' in {choice.remat for choice, _ in ranked}


def test_every_mesh_divides_pod_and_model():
  experts = dataclasses.replace(
    BASE.model,
    pattern=('attention+moe',),
    moe=MoEConfig(experts=12, top_k=2, width=64),
  )
  base = dataclasses.replace(BASE, model=experts)
  meshes = list(search.meshes(base, 16))
  # 8 and 16 do not divide 12 experts.
  assert {mesh.expert for mesh in meshes} == {1, 2, 4}
  for data, fsdp, expert, context, tensor in (
    mesh.axes.values() for mesh in meshes
  ):
    assert data * fsdp * expert * context * tensor == 16


def test_it_stops_when_its_time_is_over():
  said = []
  assert search.search(BASE, POD, -1, said.append) == []
  assert said == ['stopped after -1 s: not everything was tried']
  assert search.table([]) == 'nothing that was tried fits'
