"""The lock of a workdir in a bucket: an object that its holder keeps rewriting.

A bucket has no locks, but it can write an object only if that is still the one
that was read: it numbers every version of an object (its generation), and a
write may name the number that it replaces. So of two runs that find the lock
free, or left behind, one gets it.

The holder rewrites the object every few seconds. Whoever finds it held waits to
see whether it changes, and takes it once it has not for PATIENCE seconds; at
once, where the holder was a process of this same host that is no more. What a
bucket cannot give is a lock that goes with its holder: one that was cut off
from the bucket, or stopped, for longer than PATIENCE may have lost it. So
`check`, which a run calls before each checkpoint, asks whose it is, and a run
that has lost it ends. Metrics of such a run do no harm: each start has its own
objects.
"""

import contextlib
import datetime
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import tensorstore as ts

from gated_jax import paths
from gated_jax.bucket_requests import BucketError
from gated_jax.bucket_requests import patiently
from gated_jax.paths import Path
from gated_jax.training.lock_holder import Holder
from gated_jax.training.lock_holder import WorkdirInUse
from gated_jax.training.lock_holder import in_use
from gated_jax.training.lock_holder import is_alive
from gated_jax.training.lock_holder import is_here
from gated_jax.training.lock_holder import this_process

BEAT = 10.0  # seconds between two versions of the object
PATIENCE = 60.0  # seconds without a new one after which a holder is dead
ANSWER = 20.0  # seconds that one request may take, with its repeats


class BucketLock:
  """The lock object of a workdir, held by this process.

  Args:
    path: of the object.
    say: prints a line to the user.

  Raises:
    WorkdirInUse: another run has it.
    OSError: the bucket does not answer.
  """

  def __init__(self, path: Path, say: Callable[[str], None]):
    self._path, self._token = path, uuid.uuid4().hex
    spec = paths.key_value_store(path.parent)
    self._store = ts.KvStore.open(spec).result()
    self._since = datetime.datetime.now().astimezone()
    self._beat = 0
    self._generation = b''
    self._take(say)
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat_on, daemon=True)
    self._thread.start()

  def _take(self, say: Callable[[str], None]) -> None:
    holder, self._generation = self._read()
    if holder.get('held') and not self._is_dead(holder):
      say(
        f'{self._path} was left by process {holder.get("process")} on '
        f'{holder.get("host")}: waiting {PATIENCE:.0f} s for a sign of life'
      )
      self._watch(holder)
    if not self._write(held=True):
      raise WorkdirInUse(in_use(self._path.parent, self._read()[0]))

  def _is_dead(self, holder: Holder) -> bool:
    """Tells whether a holder is known to be no more, without waiting."""
    if is_here(holder):
      if is_alive(holder):
        raise WorkdirInUse(in_use(self._path.parent, holder))
      return True
    return False

  def _watch(self, holder: Holder) -> None:
    """Waits for another version of the lock; WorkdirInUse when one comes."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(min(2.0, PATIENCE / 4))
      seen, generation = self._read()
      if generation != self._generation:
        if seen.get('held'):
          raise WorkdirInUse(in_use(self._path.parent, holder))
        self._generation = generation  # it was given back meanwhile
        return

  def _answer(self, future: Any) -> Any:
    """What a request brings; OSError where it fails or takes too long."""
    try:
      return future.result(timeout=ANSWER)
    except (TimeoutError, ValueError, OSError, RuntimeError) as error:
      text = ' '.join(str(error).split()) or 'no answer in time'
      raise BucketError(f'{self._path}: {text}') from error

  def _read(self) -> tuple[Holder, bytes]:
    """What the object says, and its generation."""
    answer = self._answer(self._store.read(self._path.name))
    try:
      holder = json.loads(answer.value)
    except ValueError:
      holder = {}
    generation = answer.stamp.generation
    return (holder if isinstance(holder, dict) else {}), generation

  def _write(self, held: bool) -> bool:
    """Replaces the version that this process knows; False where it is gone."""
    holder = this_process(self._since, self._beat, held)
    text = json.dumps({**holder, 'token': self._token}).encode()
    stamp = self._answer(
      self._store.write(self._path.name, text, if_equal=self._generation)
    )
    if stamp.generation:
      self._generation = stamp.generation
      return True
    # An answer that was lost on its way makes this process's own version news.
    now, generation = self._read()
    if now.get('token') == self._token:
      self._generation = generation
      return True
    return False

  def _beat_on(self) -> None:
    while not self._ended.wait(BEAT):
      self._beat += 1
      with contextlib.suppress(OSError):  # `check` says what is lost
        if not self._write(held=True):
          return

  def check(self) -> None:
    """WorkdirInUse where another run has taken the lock; asks the bucket."""
    holder, _ = patiently(self._read)
    if holder.get('token') != self._token:
      raise WorkdirInUse(
        f'{self._path.parent} was taken over by process '
        f'{holder.get("process", "?")} on {holder.get("host", "?")}, as this '
        f'run gave no sign of life for {PATIENCE:.0f} s: it ends here'
      )

  def release(self) -> None:
    """Lets another run have the workdir, if it is still this one's."""
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      self._write(held=False)
