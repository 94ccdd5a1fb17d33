"""The program that measures reading from a bucket runs to its end."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.nightly
def test_every_kind_of_files_is_measured():
  pytest.importorskip('gcsfs')
  small = ['--rounds=1', '--batches=2', '--size=200000', '--delay=0.001']
  command = [sys.executable, '-m', 'tests.storage.speed', *small]
  done = subprocess.run(
    command, check=False, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  kinds = [line.split()[0] for line in done.stdout.splitlines()]
  assert kinds == ['tokens', 'jsonl', 'parquet', 'array_record']
