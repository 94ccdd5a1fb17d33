"""The numbers of a run as an event file of TensorBoard's.

tensorboardX knows the format. Its own writer works in a thread that ends with
a traceback when the disk is full, after which the run would wait for it for
ever; here a failure costs the event file alone.
"""

import contextlib
import logging
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from gated_jax import paths
from gated_jax.paths import Path

FLUSH = 30.0  # seconds between two times that the file is brought to the disk
PART = 300.0  # seconds that one file of a bucket is about
_LOG = logging.getLogger(__name__)


class TensorBoard:
  """Writes scalars into a new event file, in a bucket into one after the other.

  Args:
    folder: one of event files; made when missing.
    after: what other files there have after this step is hidden.
  """

  def __init__(self, folder: Path, after: int):
    try:
      from tensorboardX.proto import event_pb2
      from tensorboardX.record_writer import RecordWriter
      from tensorboardX.summary import scalar
    except ImportError:
      raise ValueError(
        'tensorboard=True needs a package: pip install tensorboardX'
      ) from None
    self._events, self._scalar = event_pb2, scalar
    self._writer, self._folder = RecordWriter, folder
    if isinstance(folder, pathlib.Path):
      folder.mkdir(parents=True, exist_ok=True)
      self._here, self._every = folder, FLUSH
    else:
      self._here, self._every = pathlib.Path(tempfile.mkdtemp()), PART
    self._open()
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=after + 1, session_log=start))

  def _open(self) -> None:
    # Nanoseconds, because a run may be started twice within a second.
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'
    self._path = self._here / name
    self._file: Any = self._writer(str(self._path))
    in_bucket = self._here != self._folder
    self._flushed = time.monotonic() if in_bucket else -self._every
    self._write(self._events.Event(file_version='brain.Event:2'))

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes the numbers of a step; None is no number."""
    for name, value in values.items():
      if value is not None:
        self._write(
          self._events.Event(step=step, summary=self._scalar(name, value))
        )
    if time.monotonic() - self._flushed > self._every:
      self._flushed = time.monotonic()
      if self._here == self._folder:
        self._attempt(lambda file: file.flush())
      else:
        self._attempt(self._bring_to_bucket)
        if self._file is not None:
          self._open()

  def _bring_to_bucket(self, file: Any) -> None:
    """Closes the file and moves it to the bucket, whole."""
    file.close()
    data = self._path.read_bytes()
    paths.write_bytes(self._folder / self._path.name, data)
    self._path.unlink()

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    data = event.SerializeToString()
    self._attempt(lambda file: file.write(data))

  def _attempt(self, action: Callable[[Any], None]) -> None:
    if self._file is None:
      return
    try:
      action(self._file)
    except OSError as error:
      _LOG.warning(
        'TensorBoard gets no more numbers: %s', error.strerror or error
      )
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None

  def close(self) -> None:
    """Brings the rest to the disk or the bucket."""
    if self._here == self._folder:
      self._attempt(lambda file: file.close())
    else:
      self._attempt(self._bring_to_bucket)
    self._file = None
