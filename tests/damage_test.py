"""Every file of a checkpoint, damaged in ten ways: found, named, survived.

Whoever reads gets what was saved, or an error of one line that names the file;
a run that resumes goes back to the step before and says so.
"""

import functools
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gated_jax import checkpoint
from gated_jax import damage
from gated_jax.checkpoint.folder import RUN
from gated_jax.checkpoint.sums import records
from gated_jax.config import RunConfig
from gated_jax.training.checkpoints import Checkpoints
from gated_jax.training.step import TrainState

# Readers that outlive a failed restore complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@functools.cache
def state_at(step):
  """Arrays that lie in files of their own, and small ones that do not."""
  rng = np.random.default_rng(step)
  params = {
    'embed': {'embedding': jnp.asarray(rng.normal(size=(40, 32)), 'float32')},
    'layers': {'scale': jnp.full((2, 4), step, jnp.bfloat16)},
  }
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=optax.sgd(0.1, 0.9).init(params),
    key=jax.random.key_data(jax.random.key(step)),
    skipped=zero,
    bad_in_row=zero,
  )


def abstract(tree):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
  )


def equal(found, expected):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The checkpoints of two steps."""
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  manager = Checkpoints(folder, RunConfig())
  for step in (1, 2):
    manager.save(state_at(step), f'place {step}', 3.0 - step)
  manager.wait()
  manager.close()
  return folder


def ten_ways(data, seed):
  rng = random.Random(seed)
  yield None
  yield b''
  yield data[: len(data) // 2]
  yield data[:-1]
  for _ in range(4):
    flipped = bytearray(data)
    flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    yield bytes(flipped)
  yield bytes(len(data))
  yield rng.randbytes(len(data))


def damages(folder):
  """Damages one file in one way, and mends it when asked to go on."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  assert len(files) > 15
  for path in files:
    name = str(path.relative_to(folder))
    data = path.read_bytes()
    for number, changed in enumerate(ten_ways(data, name)):
      if changed is None:
        path.unlink()
      else:
        path.write_bytes(changed)
      yield name, number
      path.write_bytes(data)


@pytest.mark.long
def test_a_run_resumes_or_goes_back_and_names_the_file(saved):
  back = set()
  for name, _ in damages(saved / '2'):
    said = []
    manager = Checkpoints(saved, RunConfig(), said.append)
    state, place, _ = manager.restore(abstract(state_at(0)))
    manager.close()
    step = int(state.step)
    assert equal(state, state_at(step)), name
    assert place == f'place {step}'
    if step == 2:
      assert not said, name
      continue
    (line,) = said
    assert f'{saved / "2"} is damaged in {name}' in line
    assert 'going back to the one before' in line
    assert '\n' not in line
    (saved / 'damaged-2').rename(saved / '2')
    back.add(name.partition('/')[0])
  assert back == {'params', 'rest', 'run'}


def load(folder):
  """As decoding, exporting and starting from a checkpoint do."""
  config = checkpoint.load_config(folder)
  params = checkpoint.load_parameters(folder, abstract(state_at(0).params))
  return config, params


@pytest.mark.long
def test_parameters_are_what_was_saved_or_the_file_is_named(saved):
  refused = set()
  for name, _ in damages(saved / '2'):
    try:
      config, params = load(saved.parent)
    except checkpoint.CheckpointError as error:
      assert f'{saved / "2"} is damaged in {name}' in str(error)
      assert '\n' not in str(error)
      refused.add(name.partition('/')[0])
      continue
    assert config == RunConfig()
    assert equal(params, state_at(2).params), name
  assert refused == {'params', 'run'}


def test_an_array_is_traced_to_a_file_too_large_for_a_checksum(
  saved, tmp_path, monkeypatch
):
  monkeypatch.setattr(damage, 'LARGEST', -1)
  folder = shutil.copytree(saved / '2', tmp_path / '2')
  damage.write_list(folder)
  (path,) = (p for p in folder.rglob('params/*/d/*') if p.stat().st_size > 4000)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(checkpoint.CheckpointError) as error:
    load(folder)
  assert f'is damaged in {path.relative_to(folder)}: ' in str(error.value)
  assert 'embed/embedding differ from what was saved' in str(error.value)


def test_words_that_change_places_change_the_sum():
  x = jnp.arange(12.0).reshape(3, 4)
  sums = {
    records({'x': y}, 'params')['params/x'][2]
    for y in (x, x[::-1], x[:, ::-1], x.T.reshape(3, 4), x.at[0, 0].set(1e-45))
  }
  assert len(sums) == 5


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused(tmp_path, value):
  params = state_at(1).params
  params = params | {'embed': {'embedding': jnp.full((40, 32), value)}}
  checkpoint.save_parameters(tmp_path / 'x', params, RunConfig())
  with pytest.raises(
    checkpoint.CheckpointError, match=r'not finite in .*embed'
  ):
    load(tmp_path / 'x')


def test_a_checkpoint_without_sums_loads_and_says_so_once(
  saved, tmp_path, caplog
):
  folder = shutil.copytree(saved / '2', tmp_path / '2')
  path = folder / RUN
  run = json.loads(path.read_bytes())
  path.write_text(json.dumps({'config': run['config']}))
  assert equal(load(folder)[1], state_at(2).params)
  (record,) = caplog.records
  assert 'before checkpoints kept sums' in record.getMessage()
