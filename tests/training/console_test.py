"""A bar on a terminal, lines elsewhere, and signals that ask to stop."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios

import pytest

from gated_jax.training import console

VALUES = {
  'loss': 1.25,
  'grad_norm': 0.5,
  'learning_rate': 3e-4,
  'tokens_per_second': 12345.6,
}


def on_terminal(monkeypatch, columns):
  """What three steps of four leave on a terminal of this width."""
  reader, writer = pty.openpty()
  size = struct.pack('HHHH', 24 if columns else 0, columns, 0, 0)
  fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
  with os.fdopen(writer, 'w') as terminal, monkeypatch.context() as patch:
    patch.setattr(sys, 'stderr', terminal)
    shown = console.Console()
    shown.start(0, 4)
    for step in range(1, 4):
      shown.advance()
      shown.show(step, 4, VALUES)
    shown.stop()
  # The kernel hands a terminal's output over in pieces, until it is closed:
  # then there is no more of it, which Linux calls an error.
  pieces = []
  with contextlib.suppress(OSError):
    while piece := os.read(reader, 1 << 16):
      pieces.append(piece)
  os.close(reader)
  return b''.join(pieces).decode()


# A terminal that nobody told its size has no columns.
@pytest.mark.parametrize('columns', [120, 0])
def test_a_terminal_gets_a_bar_with_the_numbers(monkeypatch, capsys, columns):
  found = on_terminal(monkeypatch, columns)
  last = found.rstrip().split('\r')[-1]
  assert '3/4' in last
  assert '75%|' in last
  assert 'loss=1.2500' in last
  assert not capsys.readouterr().out


def test_elsewhere_every_logged_step_is_a_line(capsys):
  shown = console.Console()
  shown.start(0, 4)
  shown.advance()
  shown.show(1, 4, VALUES)
  shown.show(2, 4, VALUES | {'mfu': 0.5})
  shown.stop()
  out, err = capsys.readouterr()
  assert out.splitlines() == [
    'step 1/4  loss 1.2500  grad 0.500  rate 3.00e-04  tokens/s 12,346',
    'step 2/4  loss 1.2500  grad 0.500  rate 3.00e-04  tokens/s 12,346'
    '  mfu 50.0%',
  ]
  assert not err


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_signal_asks_once_and_a_second_interrupt_insists(name):
  # These tests may themselves run under nohup, which has it ignored.
  hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  before = signal.getsignal(signal.SIGINT)
  with contextlib.suppress(KeyboardInterrupt), console.stop_on_signal() as stop:
    assert not stop
    signal.raise_signal(signal.Signals[name])
    assert stop.name == name
    signal.raise_signal(signal.SIGINT)
    pytest.fail('a second one had no effect')
  assert signal.getsignal(signal.SIGINT) is before
  signal.signal(signal.SIGHUP, hangup)


def test_nohup_keeps_its_word():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with console.stop_on_signal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop
  finally:
    signal.signal(signal.SIGHUP, before)


LOSE = """
import os, sys
from gated_jax.training.console import Console
shown = Console()
shown.start(0, 9)
shown.say('first')
sys.stdin.read()  # until the reader of the output is gone
for step in range(9):
  shown.advance()
  shown.say('more')
shown.stop()
os.write(int(sys.argv[1]), b'done')
"""


def lose(output, close):
  """What a program writes elsewhere whose console goes away."""
  reader, writer = os.pipe()
  process = subprocess.Popen(
    [sys.executable, '-c', LOSE, str(writer)],
    stdin=subprocess.PIPE,
    stdout=output,
    stderr=output,
    pass_fds=[writer],
    env={**os.environ, 'PYTHONPATH': ':'.join(sys.path)},
  )
  os.close(writer)
  close()
  process.stdin.close()
  assert process.wait() == 0
  with os.fdopen(reader) as file:
    return file.read()


@pytest.mark.long
def test_a_run_outlives_a_pipe_that_nobody_reads():
  reader, writer = os.pipe()

  def close():
    os.close(writer)
    with os.fdopen(reader) as file:
      assert file.readline() == 'first\n'

  assert lose(writer, close) == 'done'


@pytest.mark.long
def test_a_run_outlives_its_terminal():
  terminal, inside = pty.openpty()

  def close():
    os.close(inside)
    assert os.read(terminal, 1)
    os.close(terminal)

  assert lose(inside, close) == 'done'
