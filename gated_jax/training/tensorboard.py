"""The numbers of a run as an event file of TensorBoard's.

tensorboardX knows the format. Its own writer works in a thread that ends with
a traceback when the disk is full, after which the run would wait for it for
ever; here a failure costs the event file alone.
"""

import contextlib
import logging
import pathlib
import socket
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

FLUSH = 30.0  # seconds between two times that the file is brought to the disk
_LOG = logging.getLogger(__name__)


class TensorBoard:
  """Writes scalars into a new event file.

  Args:
    folder: one of event files; made when missing.
    after: what other files there have after this step is hidden.
  """

  def __init__(self, folder: pathlib.Path, after: int):
    try:
      from tensorboardX.proto import event_pb2
      from tensorboardX.record_writer import RecordWriter
      from tensorboardX.summary import scalar
    except ImportError:
      raise ValueError(
        'tensorboard=True needs a package: pip install tensorboardX'
      ) from None
    self._events, self._scalar = event_pb2, scalar
    folder.mkdir(parents=True, exist_ok=True)
    # Nanoseconds, because a run may be started twice within a second.
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'
    self._file: Any = RecordWriter(str(folder / name))
    self._flushed = -FLUSH
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(file_version='brain.Event:2'))
    self._write(event_pb2.Event(step=after + 1, session_log=start))

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes the numbers of a step; None is no number."""
    for name, value in values.items():
      if value is not None:
        self._write(
          self._events.Event(step=step, summary=self._scalar(name, value))
        )
    if time.monotonic() - self._flushed > FLUSH:
      self._flushed = time.monotonic()
      self._attempt(lambda file: file.flush())

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
      _LOG.warning('TensorBoard gets no more numbers: %s', error.strerror)
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None

  def close(self) -> None:
    """Brings the rest to the disk."""
    self._attempt(lambda file: file.close())
    self._file = None
