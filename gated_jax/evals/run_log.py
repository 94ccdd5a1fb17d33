"""What a run of a sweep prints: a file beside its metrics, or an object.

A process can write to a file alone. So the log of a run in a bucket is a file
on this machine while the run lasts, and is brought to the bucket now and then.
Read `sweep.py` for who starts the runs.
"""

import logging
import pathlib
import tempfile
from typing import IO

from gated_jax import paths
from gated_jax.paths import Path

_LOG = logging.getLogger(__name__)


class RunLog:
  """A log that goes on where an earlier start of the run left it.

  Args:
    path: where it is to be read.
  """

  def __init__(self, path: Path):
    self._path = path
    self.file: IO[bytes]
    if isinstance(path, pathlib.Path):
      self.file = path.open('ab')
    else:
      # It has a name only until it is closed, also where this process dies.
      self.file = tempfile.NamedTemporaryFile('ab')  # noqa: SIM115
      if paths.is_file(path):
        self.file.write(paths.read_bytes(path))
        self.file.flush()
    self._size = pathlib.Path(self.file.name).stat().st_size

  def save(self) -> None:
    """Brings what is new to the bucket; a request that fails only warns."""
    size = pathlib.Path(self.file.name).stat().st_size
    if isinstance(self._path, pathlib.Path) or size == self._size:
      return
    try:
      paths.upload(pathlib.Path(self.file.name), self._path)
      self._size = size
    except OSError as error:
      _LOG.warning('a log waits to be written: %s', error)

  def close(self) -> None:
    """Brings the rest to the bucket and lets go of the file."""
    self.save()
    self.file.close()
