"""How fast the data pipeline reads from a bucket, as a share of a disk's speed.

    python -m tests.storage.speed --delay=0.03 --rate=100e6

The same files lie on the disk and in the storage emulator, behind a proxy that
waits before every answer and carries so many bytes a second in all. Emulator
and proxy are processes of their own. The two places take turns, round by round;
what is printed is the median of the rounds' ratios, with the least and the most.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np

from gated_jax import cli
from tests.storage.proxy import Proxy

BATCH, LENGTH = 16, 1024


def serve(port, delay, rate, pipe):
  with Proxy(port) as proxy:
    proxy.delay, proxy.rate = delay, rate
    pipe.send(proxy.address)
    pipe.recv()


def write_tokens(path, size, random):
  ids = random.integers(1, 16_000, size // 2, np.uint16)
  ids[random.random(len(ids)) < 1 / 500] = 0
  np.save(path, ids)


def words(size, random):
  """Documents of about 3,000 characters."""
  known = [
    bytes(random.integers(97, 123, 6, np.uint8)).decode() for _ in 'a' * 999
  ]
  for _ in range(size // 3000):
    yield ' '.join(random.choice(known, 430))


def write_lines(path, size, random):
  with open(path, 'w') as file:
    for text in words(size, random):
      file.write(json.dumps({'text': text}) + '\n')


def write_parquet(path, size, random):
  import pyarrow
  import pyarrow.parquet

  table = pyarrow.table({'text': list(words(size, random))})
  pyarrow.parquet.write_table(table, path, row_group_size=1000)


def write_records(path, size, random):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for text in words(size, random):
    writer.write(text.encode())
  writer.close()


KINDS = {
  'tokens': ('npy', write_tokens),
  'jsonl': ('jsonl', write_lines),
  'parquet': ('parquet', write_parquet),
  'array_record': ('array_record', write_records),
}


def seconds(pipeline, batches):
  start = time.perf_counter()
  for _ in range(batches):
    next(pipeline)
  return time.perf_counter() - start


def measure(kind, folder, bucket, batches, rounds):
  from gated_jax.config import DataConfig
  from gated_jax.data.pipeline import make_pipeline

  def open_at(place):
    more = {'eos': 0} if kind == 'tokens' else {}
    return make_pipeline(
      DataConfig(
        source=kind,
        paths=f'{place}/*.{KINDS[kind][0]}',
        batch=BATCH,
        length=LENGTH,
        validation=0,
        **more,
      ),
      'train',
    )

  def turn(place):
    # A pipeline that waited for its turn would have read ahead meanwhile.
    with open_at(place) as pipeline:
      first = seconds(pipeline, 1)
      return first, seconds(pipeline, batches)

  ratios, speeds, firsts = [], [], []
  for _ in range(rounds):
    (_, disk), (first, away) = turn(folder), turn(bucket)
    ratios.append(disk / away)
    speeds.append(batches * BATCH * LENGTH / away)
    firsts.append(first)
  print(
    f'{kind:<13} {statistics.median(ratios):.2f} of the disk '
    f'({min(ratios):.2f} to {max(ratios):.2f}), '
    f'{statistics.median(speeds) / 1e6:.1f} M tokens/s, '
    f'first batch after {statistics.median(firsts):.2f} s',
    flush=True,
  )


def main(argv):
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--delay', type=float, default=0.03)
  parser.add_argument('--rate', type=float, default=100e6)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--batches', type=int, default=400)
  parser.add_argument('--size', type=int, default=16 << 20, help='of a file')
  options = parser.parse_args(argv)
  program = pathlib.Path(__file__).with_name('emulator.py')
  emulator = subprocess.Popen(
    [sys.executable, program], stdout=subprocess.PIPE, text=True
  )
  spawn = multiprocessing.get_context('spawn')
  mine, its = spawn.Pipe()
  port = int(emulator.stdout.readline())
  proxy = spawn.Process(
    target=serve, args=(port, options.delay, options.rate, its)
  )
  proxy.start()
  address = mine.recv()
  os.environ.update(
    STORAGE_EMULATOR_HOST=address,
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
    FSSPEC_GCS=json.dumps({'token': 'anon'}),
    NO_GCE_CHECK='true',
  )
  place = f'http://127.0.0.1:{port}'
  random = np.random.default_rng(0)
  try:
    body = json.dumps({'name': 'bucket'}).encode()
    urllib.request.urlopen(f'{place}/storage/v1/b', body).close()
    for kind, (suffix, write) in KINDS.items():
      with tempfile.TemporaryDirectory() as folder:
        for number in range(4):
          path = pathlib.Path(folder, f'{number}.{suffix}')
          write(path, options.size, random)
          urllib.request.urlopen(
            f'{place}/upload/storage/v1/b/bucket/o?uploadType=media'
            f'&name={kind}/{path.name}',
            path.read_bytes(),
          ).close()
        bucket = f'gs://bucket/{kind}'
        measure(kind, folder, bucket, options.batches, options.rounds)
  finally:
    mine.send('end')
    proxy.join()
    emulator.terminate()


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
