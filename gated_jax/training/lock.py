"""One run in one workdir: a lock file that process 0 holds while it runs.

The kernel gives a lock back when its holder dies, however it dies, so a lock
that was left behind does not block. Some file systems that several hosts mount
keep such locks on each host alone (gcsfuse): so the holder also changes the
file every few seconds, and whoever finds the file of another host waits to see
whether it changes.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax

from gated_jax.cli import TryLater
from gated_jax.processes import first_problem

NAME = 'lock'
BEAT = 5.0  # seconds between two changes of the file
PATIENCE = 30.0  # seconds without one after which a holder is dead


class WorkdirInUse(TryLater):
  """Another run writes into the workdir."""


class _Lock:
  """An open lock file that this process holds.

  Args:
    path: of the file; made when missing, and never removed.
    say: prints a line to the user.
  """

  def __init__(self, path: pathlib.Path, say: Callable[[str], None]):
    self._path = path
    self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      self._take(say)
    except BaseException:
      os.close(self._file)
      raise
    self._since = datetime.datetime.now().astimezone()
    self._beat = 0
    self._ended = threading.Event()
    self._write(held=True)
    self._thread = threading.Thread(target=self._beat_on, daemon=True)
    self._thread.start()

  def _take(self, say: Callable[[str], None]) -> None:
    exclusive = True
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise WorkdirInUse(self._in_use(self._read())) from None
    except OSError:  # this file system has no locks
      exclusive = False
    holder = self._read()
    here = holder.get('host') == socket.gethostname()
    if not holder.get('held') or (here and exclusive):
      return
    if here and not _is_alive(holder):
      return
    if not here:
      say(
        f'{self._path} was left by process {holder.get("process")} on '
        f'{holder.get("host")}: waiting {PATIENCE:.0f} s for a sign of life'
      )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(min(1.0, PATIENCE / 4))
      if self._read() != holder:
        raise WorkdirInUse(self._in_use(holder))

  def _in_use(self, holder: dict[str, Any]) -> str:
    return (
      f'{self._path.parent} is in use by process {holder.get("process", "?")} '
      f'on {holder.get("host", "an unknown host")} since '
      f'{holder.get("since", "an unknown time")}: two runs would destroy each '
      "other's checkpoints. End that one first, or choose another workdir"
    )

  def _read(self) -> dict[str, Any]:
    try:
      holder = json.loads(os.pread(self._file, 1 << 12, 0))
    except (OSError, ValueError):
      return {}
    return holder if isinstance(holder, dict) else {}

  def _write(self, held: bool) -> None:
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'started': _start_of(os.getpid()),
      'since': self._since.isoformat(timespec='seconds'),
      'beat': self._beat,
      'held': held,
    }
    text = json.dumps(holder).encode()
    with contextlib.suppress(OSError):  # a full disk is reported by others
      os.pwrite(self._file, text, 0)
      os.ftruncate(self._file, len(text))

  def _beat_on(self) -> None:
    while not self._ended.wait(BEAT):
      self._beat += 1
      self._write(held=True)

  def release(self) -> None:
    """Lets another run have the workdir."""
    self._ended.set()
    self._thread.join()
    self._write(held=False)
    os.close(self._file)


def _start_of(process: int) -> str:
  """When a process of this host began, in the kernel's clock; '' unknown.

  Process numbers are used again: together with this they are not.
  """
  try:
    text = pathlib.Path(f'/proc/{process}/stat').read_text(encoding='utf-8')
    return text.rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''


def _is_alive(holder: dict[str, Any]) -> bool:
  process = holder.get('process')
  return isinstance(process, int) and (
    _start_of(process) == holder.get('started') != ''
  )


@contextlib.contextmanager
def locked(workdir: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
  """Keeps other runs out of a workdir; all processes of this run call it.

  Raises:
    WorkdirInUse: another run has it; in every process.
  """
  lock, problem = None, ''
  if jax.process_index() == 0:
    try:
      lock = _Lock(workdir / NAME, say)
    except WorkdirInUse as error:
      problem = str(error)
  try:
    problem = first_problem(problem)
    if problem:
      raise WorkdirInUse(problem)
    yield
  finally:
    if lock is not None:
      lock.release()
