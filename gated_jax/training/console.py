"""What a user sees: a progress bar on a terminal, lines of text elsewhere."""

import os
import signal
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import jax
import tqdm


class Console:
  """Prints on process 0; the other processes are silent."""

  def __init__(self):
    self._bar: Any = None
    self._main = jax.process_index() == 0

  def say(self, text: str) -> None:
    if not self._main:
      return
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def start(self, step: int, steps: int) -> None:
    """Shows the bar, where standard error is a terminal."""
    if self._main and sys.stderr.isatty():
      # A terminal that was never told its size says it has none.
      known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
      size = {'dynamic_ncols': True} if known else {'ncols': 100, 'nrows': 24}
      self._bar = tqdm.tqdm(initial=step, total=steps, unit='step', **size)

  def advance(self) -> None:
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, steps: int, values: Mapping[str, float]) -> None:
    """The numbers of a logged step."""
    shown = {
      'loss': f'{values["loss"]:.4f}',
      'grad': f'{values["grad_norm"]:.3f}',
      'rate': f'{values["learning_rate"]:.2e}',
      'tokens/s': f'{values["tokens_per_second"]:,.0f}',
    }
    if values.get('mfu'):
      shown['mfu'] = f'{values["mfu"]:.1%}'
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
    else:
      text = '  '.join(f'{name} {value}' for name, value in shown.items())
      self.say(f'step {step}/{steps}  {text}')

  def stop(self) -> None:
    if self._bar is not None:
      self._bar.close()
      self._bar = None


class StopRequest:
  """Set by SIGTERM and by the first Ctrl-C; the loop looks at it."""

  def __init__(self):
    self.name = ''

  def __bool__(self) -> bool:
    return bool(self.name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
  """Turns SIGTERM and the first Ctrl-C into a request to stop."""
  request = StopRequest()
  # With several processes JAX's own service listens, so that all stop at the
  # same step; taking the signal away from it would make one stop alone.
  if jax.process_count() > 1:
    yield request
    return

  def handle(number, frame):
    if request and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.name = signal.Signals(number).name

  old = {
    number: signal.signal(number, handle)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield request
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
