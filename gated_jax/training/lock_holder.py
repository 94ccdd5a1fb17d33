"""Who holds the lock of a workdir, as its file or object says."""

import datetime
import os
import pathlib
import socket
from typing import Any

from gated_jax.cli import TryLater
from gated_jax.paths import Path

Holder = dict[str, Any]


class WorkdirInUse(TryLater):
  """Another run writes into the workdir."""


def this_process(
  since: datetime.datetime, beat: int, held: bool
) -> dict[str, Any]:
  """The words of this process about itself.

  Args:
    since: when it took the lock.
    beat: a number that grows each time.
    held: False: it gives the lock back.
  """
  return {
    'host': socket.gethostname(),
    'boot': _boot(),
    'process': os.getpid(),
    'started': start_of(os.getpid()),
    'since': since.isoformat(timespec='seconds'),
    'beat': beat,
    'held': held,
  }


def in_use(workdir: Path, holder: Holder) -> str:
  """The message for a second run in a workdir."""
  return (
    f'{workdir} is in use by process {holder.get("process", "?")} '
    f'on {holder.get("host", "an unknown host")} since '
    f'{holder.get("since", "an unknown time")}: two runs would destroy each '
    "other's checkpoints. End that one first, or choose another workdir"
  )


def is_here(holder: Holder) -> bool:
  """Tells whether a holder runs, or ran, on this host.

  Names of hosts are given again, and containers of one host may not see each
  other's processes: so the kernel's boot and the list of processes decide too.
  """
  same = holder.get('host') == socket.gethostname()
  return same and holder.get('boot', _boot()) == _boot()


def is_alive(holder: Holder) -> bool:
  """Tells whether the process of a holder on this host still runs."""
  process = holder.get('process')
  return isinstance(process, int) and (
    start_of(process) == holder.get('started') != ''
  )


def start_of(process: int) -> str:
  """When a process of this host began, in the kernel's clock; '' unknown.

  Process numbers are used again: together with this they are not.
  """
  try:
    text = pathlib.Path(f'/proc/{process}/stat').read_text(encoding='utf-8')
    return text.rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''


def _boot() -> str:
  """Names this host's running kernel and list of processes; '' not known."""
  try:
    kernel = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{kernel} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''
