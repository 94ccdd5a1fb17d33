"""Eight CPU devices for every test, and buckets on loopback for those that ask.

`bucket` is the fixture to take: the address of a new, empty bucket. The proxy of
`tests/storage/proxy.py` stands before it, as `storage.proxy`, to put faults in;
programs that a test starts need `storage.environment`. `s3_bucket` and `s3` are
the same of another kind of storage, which fewer tests need.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest

from tests.storage.proxy import Proxy

_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Libraries read these when they are imported. The emulator does not speak gRPC,
# by which gcsfs asks for the kind of a bucket, and there are no credentials to
# look for, which takes seconds.
os.environ.update(
  GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
  FSSPEC_GCS=json.dumps({'token': 'anon'}),
  NO_GCE_CHECK='true',
)


@pytest.fixture(scope='session')
def storage():
  """The emulator in its own process, and this process's clients set to it.

  It has `proxy`, `environment` (of clients in other processes) and
  `make_bucket(name)`.
  """
  pytest.importorskip('gcsfs')
  program = pathlib.Path(__file__).parent / 'storage/emulator.py'
  with subprocess.Popen(
    [sys.executable, program], stdout=subprocess.PIPE, text=True
  ) as process:
    with Proxy(int(process.stdout.readline())) as proxy:
      environment = {
        'STORAGE_EMULATOR_HOST': proxy.address,
        'TENSORSTORE_GCS_HTTP_URL': proxy.address,
      }
      os.environ.update(environment)

      def make_bucket(name):
        body = json.dumps({'name': name}).encode()
        place = f'{proxy.address}/storage/v1/b'
        urllib.request.urlopen(urllib.request.Request(place, body)).close()
        return f'gs://{name}'

      yield types.SimpleNamespace(
        proxy=proxy, environment=environment, make_bucket=make_bucket
      )
    process.terminate()


def new_bucket(server):
  """A bucket of a number that no test had; afterwards faults are gone."""
  number = getattr(server, 'number', 0)
  server.number = number + 1
  yield server.make_bucket(f'test-bucket-{number}')
  server.proxy.heal()


@pytest.fixture
def bucket(storage):
  """The address of a new bucket, without a slash at its end."""
  yield from new_bucket(storage)


@pytest.fixture(scope='session')
def s3(tmp_path_factory):
  """A server that speaks S3, and this process's clients set to it.

  Like `storage`; a request that brings no byte for 0.3 s has failed.
  """
  pytest.importorskip('s3fs', reason="pip install -e '.[compare]'")
  pytest.importorskip('moto', reason="pip install -e '.[compare]'")
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'moto.server', '-H127.0.0.1', f'-p{port}']
  log = (tmp_path_factory.mktemp('s3') / 'log').open('w+')
  with subprocess.Popen(command, stdout=log, stderr=log) as process:
    while process.poll() is None:
      with (
        contextlib.suppress(OSError),
        socket.create_connection(('127.0.0.1', port)),
      ):
        break
      time.sleep(0.02)
    assert process.poll() is None, log.seek(0) or log.read()
    with Proxy(port) as proxy:
      environment = {
        'AWS_ENDPOINT_URL': proxy.address,
        'AWS_ACCESS_KEY_ID': 'test',
        'AWS_SECRET_ACCESS_KEY': 'test',
        'AWS_DEFAULT_REGION': 'us-east-1',
        'AWS_EC2_METADATA_DISABLED': 'true',
      }
      os.environ.update(environment)
      from fsspec.config import conf

      times = {'read_timeout': 0.3, 'retries': {'max_attempts': 1}}
      conf.setdefault('s3', {})['config_kwargs'] = times

      def make_bucket(name):
        place = urllib.request.Request(f'{proxy.address}/{name}', method='PUT')
        urllib.request.urlopen(place).close()
        return f's3://{name}'

      yield types.SimpleNamespace(
        proxy=proxy, environment=environment, make_bucket=make_bucket
      )
    process.terminate()


@pytest.fixture
def s3_bucket(s3):
  """The address of a new bucket of S3, without a slash at its end."""
  yield from new_bucket(s3)


@pytest.fixture
def impatient(storage, monkeypatch):
  """A request that brings no byte for a fifth of a second has failed."""
  import aiohttp
  from fsspec.config import conf

  silence = aiohttp.ClientTimeout(sock_read=0.2)
  monkeypatch.setitem(conf['gcs'], 'requests_timeout', silence)


@pytest.fixture
def at_once(monkeypatch):
  """Repeats of a request come without the wait between them."""
  import gcsfs.retry

  async def sleep(seconds):
    del seconds

  waits = types.SimpleNamespace(sleep=sleep)
  monkeypatch.setattr(gcsfs.retry, 'asyncio', waits)
