"""Which choices are tried, in what order they are shown, and when it stops."""

import dataclasses
import types

import pytest

from gated_jax.aot import search
from gated_jax.aot.guess import Guess
from gated_jax.aot.report import DoesNotFit
from gated_jax.config import MoEConfig
from gated_jax.config import RunConfig

POD = [types.SimpleNamespace(device_kind='TPU v5 lite')] * 16
BASE = RunConfig()


# Rows of a device at once that fit, by what is recomputed, and its speed; then
# the guess of that speed, and GiB that a row is guessed to need at the least.
ROOM = {'none': (0, 0), 'minimal': (1, 1000), 'attention': (2, 800)}
ROOM |= {'exchange': (2, 850), 'full': (4, 500)}
GUESS = {'none': (1000, 7.5), 'minimal': (1000, 7), 'attention': (950, 3)}
GUESS |= {'exchange': (940, 3), 'full': (900, 1)}


def rows_of(config):
  """Rows of a device, and how many of them at once."""
  each = config.data.batch * config.mesh.tensor / len(POD)
  return each, each / config.optimizer.accumulate


def examined(config, devices, price):
  """As if it were compiled; rows in parts need memory one after the other."""
  each, at_once = rows_of(config)
  most, speed = ROOM[config.model.remat]
  if not most:
    raise DoesNotFit('it does not fit')
  speed *= (1 if each == at_once else 0.9) * each / config.mesh.tensor
  return types.SimpleNamespace(
    excess=0 if at_once <= most else 5.0,
    tokens_per_second=speed,
    utilisation=speed / 1e4,
    compiled=types.SimpleNamespace(
      memory=types.SimpleNamespace(peak=each * 2**30), config=config
    ),
  )


def guessed(config):
  """Split heads are half as quick; more rows at once a little quicker."""
  _, at_once = rows_of(config)
  speed, memory = GUESS[config.model.remat]
  speed = (speed + at_once) / config.mesh.tensor
  return Guess(1 / speed, at_once * memory * 2**30, 1)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
  monkeypatch.setattr(search, 'examine', examined)
  monkeypatch.setattr(search.kernels, 'prices', lambda *what: None)
  monkeypatch.setattr(search.Guesser, 'of', lambda base, devices: guessed)


def run(base, seconds=60, **options):
  """What was ranked, what was compiled in its order, and all that was said."""
  said = []
  ranked = search.search(base, POD, seconds, said.append, **options)
  compiled = [
    tuple(
      line.partition(f'{name}=')[2].split()[0].rstrip(':')
      for name in ('tensor', 'remat', 'batch', 'accumulate')
    )
    for line in said
    if 'not compiled' not in line and 'stopped' not in line
  ]
  return ranked, compiled, '\n'.join(said)


def with_batch(rows, **model):
  data = dataclasses.replace(BASE.data, batch=rows)
  model = dataclasses.replace(BASE.model, **model)
  return dataclasses.replace(BASE, data=data, model=model)


def test_what_fits_is_shown_with_its_flags_quickest_first():
  ranked, *_ = run(BASE)
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


def test_the_quickest_guess_is_compiled_first_and_what_cannot_pay_never():
  _, compiled, said = run(BASE)
  assert [choice[1:3] for choice in compiled] == [
    ('minimal', '32'),  # too large, and so is whatever saves more or is larger
    ('minimal', '16'),
    ('none', '16'),
    ('attention', '64'),
    ('attention', '32'),
    ('full', '128'),
    ('full', '64'),
  ]
  assert {choice[0] for choice in compiled} == {'1'}
  behind = 'not compiled, as its guess is far behind: fsdp 8 x tensor 2: '
  line = next(line for line in said.splitlines() if behind in line)
  assert 'minimal 16/1 (501 tokens/s, 14.0 GiB)' in line
  unneeded = 'remat=full --config.data.batch=16 --config.optimizer.accumulate=1'
  assert f'{unneeded}: not compiled, as what saves more fits' in said


def test_what_must_hold_more_than_a_device_has_is_named_and_not_compiled():
  _, compiled, said = run(BASE)
  assert ('1', 'minimal', '64', '1') not in compiled
  too_large = 'not compiled, as it must hold more than v5e has: fsdp 16: '
  line = next(line for line in said.splitlines() if too_large in line)
  assert 'minimal 64/1 (1,004 tokens/s, 28.0 GiB)' in line
  assert 'minimal 32/1' not in line


def test_what_needs_no_less_than_what_did_not_fit_is_not_compiled():
  _, compiled, said = run(BASE)
  assert ('1', 'minimal', '32', '1') in compiled
  assert ('1', 'none', '32', '1') not in compiled
  skipped = 'remat=none --config.data.batch=32 --config.optimizer.accumulate=1'
  assert f'{skipped}: not compiled, as what needs less did not fit' in said


def test_the_same_batch_comes_in_parts_too():
  ranked, compiled, _ = run(with_batch(64), same_batch=True)
  assert {batch for _, _, batch, _ in compiled} == {'64'}
  assert [choice[1::2] for choice in compiled] == [
    ('minimal', '2'),
    ('minimal', '4'),
    ('none', '4'),
    ('attention', '1'),
    ('attention', '2'),
    ('full', '1'),
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
  ranked, *_ = run(base, same_batch=True)
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
  ranked, _, said = run(BASE, seconds=-1)
  assert ranked == []
  assert said.endswith('stopped after -1 s: not everything was tried')
  assert search.table([]) == 'nothing that was tried fits'
