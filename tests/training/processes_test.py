"""Two real processes over loopback, four devices each, and what kills them."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gated_jax import checkpoint
from gated_jax import paths
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.data.pipeline import make_pipeline
from gated_jax.evals import metric_files
from gated_jax.model.decoder import Decoder
from gated_jax.training import build
from gated_jax.training.rows import rows_of_process
from gated_jax.training.rows import to_devices
from tests.storage.proxy import SILENT

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
# As configs/smoke.py, but small; gates, RoPE, real text and float32 as there.
TINY = {
  'steps': STEPS,
  'log_every': 1,
  'eval_every': 0,
  'eval_batches': 1,
  'probe_every': 0,
  'figures': False,
  'model.vocab': 260,  # of which 257 are tokens: tensor 2 divides it
  'model.length': 32,
  'model.depth': 1,
  'model.width': 32,
  'model.head_dim': 8,
  'model.mlp_width': 32,
  'model.scan': False,
  'data.source': 'text',
  'data.batch': 8,
  'data.length': 32,
  'data.shuffle_tokens': 1024,
  'optimizer.warmup_steps': 2,
  'checkpoint.every': 2,
  'mesh.data': 2,
  'mesh.fsdp': 2,
  'mesh.tensor': 2,
}
ENVIRONMENT = {
  **os.environ,
  'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  'JAX_PLATFORMS': 'cpu',
  # Seconds of compilation for a model that takes milliseconds.
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
}


def free_port():
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]


def start(workdir, settings, processes=(0, 1), flags=(), more=()):
  """Both processes of a run, or some; settings: one dict for each."""
  port = free_port()
  return [
    subprocess.Popen(
      [
        sys.executable,
        'train.py',
        '--config=configs/smoke.py',
        f'--workdir={workdir}',
        f'--coordinator=localhost:{port}',
        '--processes=2',
        f'--process_id={i}',
        *flags,
        *(f'--config.{name}={value}' for name, value in settings[i].items()),
      ],
      cwd=ROOT,
      env=ENVIRONMENT | dict(more),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in processes
  ]


# Words that JAX's CPU network prints from several threads at once, in pieces.
GLOO = re.compile(
  r'([\d\s:]|\[Gloo\]|Rank|is|connected|to|peer|ranks\.|Expected|number|of'
  r'|ranks)*'
)


def finish(processes):
  """(exit code, what was said, errors) of each, without the network's words."""
  found = []
  for process in processes:
    out, err = process.communicate(timeout=280)
    said = [x for x in out.splitlines() if not GLOO.fullmatch(x)]
    found.append((process.returncode, said, err))
  return found


def end(processes):
  for process in processes:
    process.kill()
    process.communicate()


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """Of a run over two text files, so that each process has one of its own."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for name, letters in (('one', 'abcd'), ('two', 'uvwxyz')):
    words = rng.choice(list(letters), (4000, 5))
    lines = [''.join(word) for word in words]
    documents = ['\n'.join(lines[i::40]) for i in range(40)]
    for i, text in enumerate(documents):
      (folder / f'{name}_{i:02}.txt').write_text(text, encoding='utf-8')
  return TINY | {'data.paths': f'{folder}/*.txt'}


def losses(workdir):
  records = metric_files.read(workdir / 'metrics.jsonl')
  found = [(r['step'], r['loss']) for r in records if 'loss' in r]
  steps = [step for step, _ in found]
  assert steps == list(range(1, len(steps) + 1)), 'one set of metrics, in order'
  return dict(found)


@pytest.fixture(scope='module')
def undisturbed(settings, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two')
  first, second = finish(start(workdir, [settings, settings]))
  assert first[0] == second[0] == 0, first[2] + second[2]
  return workdir, first[1], second[1]


def nested(settings):
  """The config of a run, as the flags make it."""
  from configs import smoke

  values = smoke.get_config()
  values.update_from_flattened_dict(settings)
  return from_dict(values.to_dict())


def arrays(workdir):
  """Sums of all arrays of the last step."""
  return checkpoint.read_run(workdir / f'checkpoints/{STEPS}')['arrays']


@pytest.mark.nightly
def test_two_processes_share_a_run_in_a_bucket_also_when_killed(
  settings, undisturbed, bucket, storage
):
  workdir = f'{bucket}/two'
  mark = 'POST .*upload_id=.*checkpoints/4/commit_success'
  storage.proxy.fail(mark, status=SILENT, times=1)
  both = start(workdir, [settings, settings], more=storage.environment)
  while not storage.proxy.struck():
    assert all(process.poll() is None for process in both), finish(both)
    time.sleep(0.01)
  end(both)
  storage.proxy.heal()
  both = start(workdir, [settings, settings], more=storage.environment)
  (code, said, err), (other_code, _, other_err) = finish(both)
  assert code == other_code == 0, err + other_err
  assert 'resuming after step 2' in said
  there = paths.expand(workdir)
  assert losses(there) == losses(undisturbed[0])
  assert arrays(there) == arrays(undisturbed[0])


@pytest.mark.long
def test_two_processes_train_as_one_on_what_each_reads(settings, undisturbed):
  """One process with eight devices, given both processes' rows."""
  config: RunConfig = nested(settings)
  assert config.mesh == MeshConfig(data=2, fsdp=2, tensor=2)
  read = [
    make_pipeline(config.data, 'train', shard=i, shards=2, vocab=260)
    for i in range(2)
  ]
  mesh = sharding.make_mesh(config.mesh)
  rows = sharding.batch_sharding(mesh)
  own = rows_of_process(rows, config.data.batch, config.data.length)
  assert (own.part, own.parts) == (0, 1)
  found = {}
  with sharding.activate(mesh):
    _, init, step = build.make_functions(config, Decoder(config.model), mesh)
    state = init(jax.random.key(config.seed))
    for i in range(1, STEPS + 1):
      halves = [next(pipeline) for pipeline in read]
      assert not np.array_equal(halves[0]['tokens'], halves[1]['tokens'])
      batch = {
        name: np.concatenate([half[name] for half in halves])
        for name in halves[0]
      }
      state, scalars = step(state, to_devices(batch, rows, own))
      found[i] = float(scalars['loss'])
  for pipeline in read:
    pipeline.close()
  workdir, said, silent = undisturbed
  expected = losses(workdir)
  assert list(expected) == list(found)
  # Adam's first steps follow a gradient's sign: rounding grows with them.
  np.testing.assert_allclose(
    list(found.values()), list(expected.values()), rtol=STEPS * 256 * 2.0**-24
  )
  assert any('validation loss' in line for line in said)
  assert not silent, 'only process 0 speaks'


@pytest.mark.long
def test_a_killed_process_costs_only_a_restart(settings, undisturbed, tmp_path):
  """Both start again from the checkpoint, to the bit."""
  flags = ['--peer_timeout=4']
  processes = start(tmp_path, [settings, settings], flags=flags)
  path = tmp_path / 'metrics.jsonl'
  # Several steps on, and before the evaluation that precedes the last save.
  while not (
    (tmp_path / 'checkpoints' / '2').is_dir()
    and '"step": 4' in path.read_text(encoding='utf-8')
  ):
    assert all(p.poll() is None for p in processes), finish(processes)
    time.sleep(0.001)
  processes[1].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  (code, _, err), _ = finish(processes)
  # A shell says 134.
  assert code == -signal.SIGABRT, 'the other one ends by itself'
  assert time.monotonic() - begin < 60
  assert re.match(r'error: process 1 on \S+ is gone: ', err)
  first, second = finish(start(tmp_path, [settings, settings]))
  assert first[0] == second[0] == 0, first[2] + second[2]
  (line,) = [line for line in first[1] if 'resuming after step' in line]
  assert 0 < int(line.split()[-1]) < STEPS
  assert losses(tmp_path) == losses(undisturbed[0])


@pytest.mark.nightly
def test_adapters_of_two_processes_are_saved_apart_also_when_killed(
  settings, undisturbed, tmp_path
):
  """Both are killed in the middle of a save that holds the adapters alone."""
  base = undisturbed[0]
  tuned = settings | {
    'init_from': base,
    'model.lora.rank': 2,
    'model.lora.dropout': 0.25,
    'optimizer.train': 'adapters',
  }
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for code, _, err in finish(start(whole, [tuned, tuned])):
    assert code == 0, err
  for after in (0, 2):
    both = start(killed, [tuned, tuned])
    while not _in_a_save(killed / 'checkpoints', after):
      assert all(process.poll() is None for process in both), finish(both)
      time.sleep(0.001)
    end(both)
  (code, said, err), (other_code, _, other_err) = finish(
    start(killed, [tuned, tuned])
  )
  assert code == other_code == 0, err + other_err
  assert any('resuming after step' in line for line in said)
  assert losses(killed) == losses(whole)
  assert arrays(killed) == arrays(whole)
  stored = checkpoint.read_run(whole / f'checkpoints/{STEPS}')
  assert stored['base']['path'].startswith(str(base))
  # Every array of the model is recorded; what lies in the base is not saved.
  every = {name for name in stored['arrays'] if name.startswith('params/')}
  frozen = {name for name in every if '_lora_' not in name}
  assert set(stored['base']['arrays']) == frozen < every


def _in_a_save(folder, after):
  """A step is half written, and one with this number or a later one whole."""
  names = [path.name for path in folder.glob('*')] if folder.is_dir() else []
  whole = [int(name) for name in names if name.isdigit()]
  partial = any('orbax-checkpoint-tmp' in name for name in names)
  return partial and max(whole, default=0) >= after


@pytest.mark.long
def test_processes_with_different_settings_are_refused(settings, tmp_path):
  other = settings | {'optimizer.learning_rate': 0.5}
  for code, said, err in finish(start(tmp_path, [settings, other])):
    assert code == 2, err
    assert not said
    lines = [line for line in err.splitlines() if line.startswith('error')]
    assert lines == [
      'error: processes 0 and 1 have different settings: '
      'optimizer.learning_rate: 0.003, 0.5'
    ]


@pytest.mark.long
@pytest.mark.parametrize('present', [0, 1])
def test_a_process_that_never_joins_is_reported(settings, tmp_path, present):
  begin = time.monotonic()
  (found,) = finish(
    start(tmp_path, [settings] * 2, [present], ['--join_timeout=2'])
  )
  code, _, err = found
  assert code == 1
  (line,) = err.splitlines()
  assert re.match(
    rf'error: process {present} of 2, on \S+, could not join the others at '
    r'localhost:\d+ within 2 s',
    line,
  )
  assert time.monotonic() - begin < 60
