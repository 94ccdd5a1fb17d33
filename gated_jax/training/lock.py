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

from gated_jax.paths import Path
from gated_jax.processes import gather
from gated_jax.training.bucket_lock import BucketLock
from gated_jax.training.lock_holder import WorkdirInUse
from gated_jax.training.lock_holder import in_use
from gated_jax.training.lock_holder import is_alive
from gated_jax.training.lock_holder import this_process

NAME = 'lock'
BEAT = 5.0  # seconds between two changes of the file
PATIENCE = 30.0  # seconds without one after which a holder is dead


class FileLock:
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
      raise WorkdirInUse(in_use(self._path.parent, self._read())) from None
    except OSError:  # this file system has no locks
      exclusive = False
    holder = self._read()
    here = holder.get('host') == socket.gethostname()
    if not holder.get('held') or (here and exclusive):
      return
    if here and not is_alive(holder):
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
        raise WorkdirInUse(in_use(self._path.parent, holder))

  def _read(self) -> dict[str, Any]:
    try:
      holder = json.loads(os.pread(self._file, 1 << 12, 0))
    except (OSError, ValueError):
      return {}
    return holder if isinstance(holder, dict) else {}

  def _write(self, held: bool) -> None:
    holder = this_process(self._since, self._beat, held)
    text = json.dumps(holder).encode()
    with contextlib.suppress(OSError):  # a full disk is reported by others
      os.pwrite(self._file, text, 0)
      os.ftruncate(self._file, len(text))

  def _beat_on(self) -> None:
    while not self._ended.wait(BEAT):
      self._beat += 1
      self._write(held=True)

  def check(self) -> None:
    """The kernel keeps the lock for this process as long as it lives."""

  def release(self) -> None:
    """Lets another run have the workdir."""
    self._ended.set()
    self._thread.join()
    self._write(held=False)
    os.close(self._file)


@contextlib.contextmanager
def locked(
  workdir: Path, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
  """Keeps other runs out of a workdir; all processes of this run call it.

  Yields:
    A check, for all processes to call together: WorkdirInUse, in all, where
    another run has taken the lock meanwhile, as can happen in a bucket.

  Raises:
    WorkdirInUse: another run has it; in every process.
  """
  lock: FileLock | BucketLock | None = None

  def take() -> None:
    nonlocal lock
    path = workdir / NAME
    if isinstance(path, pathlib.Path):
      lock = FileLock(path, say)
    else:
      lock = BucketLock(path, say)

  def check() -> None:
    if isinstance(workdir, pathlib.Path):
      return
    _on_the_first(lock.check if lock is not None else lambda: None)

  try:
    _on_the_first(take)
    yield check
  finally:
    if lock is not None:
      lock.release()


def _on_the_first(action: Callable[[], None]) -> None:
  """Does something in process 0; what it raises there is raised in all."""
  kind, problem = '', ''
  if jax.process_index() == 0:
    try:
      action()
    except (WorkdirInUse, OSError) as error:
      kind, problem = type(error).__name__, str(error)
  kind, problem = gather([kind, problem])[0]
  if problem:
    raise (WorkdirInUse if kind == WorkdirInUse.__name__ else OSError)(problem)
