"""One line on a process that is gone, before what JAX's runtime prints."""

import json
import pathlib
import subprocess
import sys

import pytest

from gated_jax import gone

HEAD = (
  'F1126 15:02:28.300384   14633 client.h:80] Terminating process because the '
  'JAX distributed service detected fatal errors. This most likely indicates '
  'that another task died; see the other task logs. absl::Status: '
)
STACK = '*** Check failure stack trace: ***\n    @     0x7f67b6b40634  absl\n'
UNHEALTHY = (
  'UNAVAILABLE: The following tasks are unhealthy (stopped sending '
  'heartbeats):\n{}The tasks have crashed. Check the logs to debug further.\n'
)
LEADER = 'UNAVAILABLE: Failed to send RPC to coordination service.\n'


def copied(*parts):
  """What comes out when the parts are written one by one."""
  process = subprocess.Popen(
    [sys.executable, '-S', '-E', str(pathlib.Path(gone.__file__))],
    stdin=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  for part in parts:
    process.stdin.write(part.encode())
    process.stdin.flush()
  process.stdin.close()
  return process.stderr.read().decode()


@pytest.mark.parametrize(
  ('status', 'begin'),
  [
    (UNHEALTHY.format('1\n'), 'error: process 1 on b is gone: its own output'),
    (
      UNHEALTHY.format('1\n12\n'),
      'error: process 1 on b, process 12 are gone: their own output',
    ),
    (
      UNHEALTHY.format('/job:jax_worker/replica:0/task:2\n'),
      'error: process 2 on c is gone',
    ),
    (LEADER, 'error: process 0 on a is gone'),
    ('DEADLINE_EXCEEDED: RPC: Heartbeat\n', 'error: process 0 on a is gone'),
  ],
)
def test_the_line_comes_first_and_the_rest_is_still_there(status, begin):
  hosts = gone.HOSTS.decode() + json.dumps(['a', 'b', 'c']) + '\n'
  message = HEAD + status + STACK
  out = copied('before\n', hosts, message[:150], message[150:])
  before, line, rest = out.split('\n', 2)
  assert before == 'before'
  assert line.startswith(begin)
  assert 'start the same command again on all hosts' in line
  assert rest == message


def test_everything_else_is_copied_as_it_is():
  text = 'a warning\n\nE0000 no newline at the end, and \u00fc'
  assert copied(text) == text
