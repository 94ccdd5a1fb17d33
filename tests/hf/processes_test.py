"""Two processes, each with a part of the model, read and write one folder."""

import os
import socket
import subprocess
import sys

import pytest

from gated_jax.hf import convert

PROGRAM = """
import sys

import jax

port, process, folder = sys.argv[1:]
jax.distributed.initialize(f'localhost:{port}', 2, int(process))

from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.hf import convert

mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
config, params = convert.load(f'{folder}/theirs', mesh)
kernel = convert.flatten(params)['layers/attention/query/kernel']
assert not kernel.is_fully_addressable
convert.save(f'{folder}/again', params, config, shard_bytes=20_000)
try:
  convert.save(f'{folder}/theirs', params, config)
except ValueError as error:
  print('refused:', error)
"""


@pytest.mark.long
def test_every_process_has_a_part_and_the_first_one_writes(
  cases, make_params, tmp_path
):
  family, config = cases['gated_elementwise']
  params = make_params(config)
  convert.save(tmp_path / 'theirs', params, config, family, shard_bytes=20_000)
  with socket.socket() as server:
    server.bind(('localhost', 0))
    port = server.getsockname()[1]
  flags = '--xla_force_host_platform_device_count=2'
  running = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), str(tmp_path)],
      env={
        **os.environ,
        'XLA_FLAGS': flags,
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join(sys.path),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for process in running:
      said, errors = process.communicate(timeout=200)
      assert process.returncode == 0, errors[-2000:]
      assert 'refused:' in said and 'exists' in said
  finally:
    for process in running:
      process.kill()
  first, second = (
    {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    for name in ('theirs', 'again')
  )
  assert len(first) > 3
  assert first == second
