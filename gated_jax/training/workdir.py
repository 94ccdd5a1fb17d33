"""Whether a folder takes a run, asked before anything is compiled."""

import pathlib
import tempfile
import uuid

from gated_jax import paths
from gated_jax.checkpoint.folder import check_place
from gated_jax.paths import Path


def check_workdir(workdir: Path) -> None:
  """ValueError where nothing can be written."""
  if not isinstance(workdir, pathlib.Path):
    check_bucket_of(workdir)
    return
  for folder in (workdir, workdir / 'checkpoints'):
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder):
        pass
    except OSError as error:
      raise ValueError(
        f'cannot write to workdir {folder}: {error.strerror or error}'
      ) from None


def check_bucket_of(workdir: Path) -> None:
  """ValueError where a bucket takes no run."""
  check_place(workdir)
  paths.check_bucket(workdir)
  probe = workdir / f'probe-{uuid.uuid4().hex}'
  try:
    with paths.requests_to(workdir):
      if workdir.is_file():
        raise ValueError(
          f'workdir {workdir} is an object: a folder is needed, so take '
          'another name'
        )
      paths.write_bytes(probe, b'')
      probe.unlink()
  except OSError as error:
    reason = str(error).removeprefix(f'{probe}: ')
    raise ValueError(f'cannot write to workdir {workdir}: {reason}') from None
