"""Shows a run: a progress bar on a terminal, lines of text elsewhere."""

import os
import select
import signal
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import tqdm

from gated_jax.cli import discard

# Signals that ask a run to save and stop. SIGHUP comes when a terminal closes.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Console:
  """Prints on process 0; the other processes are silent.

  A run outlives its console: what cannot be printed any more is dropped.
  """

  def __init__(self) -> None:
    self._bar: Any = None
    self._main = jax.process_index() == 0

  def say(self, text: str) -> None:
    """Prints a line, above the bar if there is one."""
    if not self._main:
      return
    if self._bar is not None:
      self._attempt(lambda: self._bar.write(text))
    else:
      self._attempt(lambda: print(text, flush=True))

  def start(self, step: int, steps: int) -> None:
    """Shows the bar, where standard error is a terminal."""
    if self._main and sys.stderr.isatty():
      self._attempt(lambda: self._open_bar(step, steps))

  def _open_bar(self, step: int, steps: int) -> None:
    # A terminal that was never told its size says it has none.
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    size = {'dynamic_ncols': True} if known else {'ncols': 100, 'nrows': 24}
    self._bar = tqdm.tqdm(initial=step, total=steps, unit='step', **size)

  def advance(self) -> None:
    """Moves the bar by a step."""
    if self._bar is not None:
      self._attempt(self._bar.update)

  def show(self, step: int, steps: int, values: Mapping[str, float]) -> None:
    """Shows the numbers of a logged step."""
    shown = {
      'loss': f'{values["loss"]:.4f}',
      'grad': f'{values["grad_norm"]:.3f}',
    }
    if 'learning_rate' in values:  # an optimizer of one's own has none to show
      shown['rate'] = f'{values["learning_rate"]:.2e}'
    shown['tokens/s'] = f'{values["tokens_per_second"]:,.0f}'
    if values.get('mfu'):
      shown['mfu'] = f'{values["mfu"]:.1%}'
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
    else:
      text = '  '.join(f'{name} {value}' for name, value in shown.items())
      self.say(f'step {step}/{steps}  {text}')

  def stop(self) -> None:
    """Takes the bar away, with its last state left on the terminal."""
    if self._bar is not None:
      self._attempt(self._bar.close)
      self._bar = None

  def _attempt(self, write: Callable[[], Any]) -> None:
    try:
      write()
    except OSError:
      # The disk of a log may be full for a while; a pipe whose reader has
      # ended and a terminal that is closed never come back.
      if not has_reader(sys.stderr):
        self._bar = None
      for stream in (sys.stdout, sys.stderr):
        if not has_reader(stream):
          discard(stream)


def has_reader(stream: Any) -> bool:
  """Says if text written to a stream can reach anybody."""
  try:
    descriptor = stream.fileno()
  except (AttributeError, OSError, ValueError):  # not a file of the system
    return True
  poll = select.poll()
  poll.register(descriptor, select.POLLOUT)
  lost = select.POLLERR | select.POLLHUP | select.POLLNVAL
  return not any(event & lost for _, event in poll.poll(0))


class StopRequest:
  """Set by a signal; the loop looks at it after every step."""

  def __init__(self) -> None:
    self.name = ''

  def __bool__(self) -> bool:
    return bool(self.name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
  """Turns SIGTERM, SIGHUP and the first Ctrl-C into a request to stop.

  SIGHUP stays ignored where it was: that is how nohup keeps it away.
  """
  request = StopRequest()
  # JAX's own service listens for SIGTERM where there are several processes, so
  # that all stop at the same step; the other signals are passed on to it.
  several, ignored = jax.process_count() > 1, signal.SIG_IGN

  def handle(number: int, frame: FrameType | None) -> None:
    """Asks the loop to save and end; a second Ctrl-C ends at once."""
    if request and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.name = signal.Signals(number).name
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  numbers = [
    number
    for number in STOPS
    if not (several and number == signal.SIGTERM)
    and not (number == signal.SIGHUP and signal.getsignal(number) == ignored)
  ]
  old = {number: signal.signal(number, handle) for number in numbers}
  try:
    yield request
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
