"""The processes of one run: how they join, agree, and learn of a loss."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gated_jax import gone


class Group(NamedTuple):
  """Which processes are to join, and for how long each is waited for."""

  coordinator: str = ''  # host:port of process 0; '': found by JAX
  processes: int = 0  # 0: found by JAX
  process_id: int = -1  # -1: found by JAX
  join_timeout: int = 300  # seconds until all must have joined
  peer_timeout: int = 20  # seconds without a sign of life until one is gone


def join(group: Group) -> None:
  """Connects to the other processes of a run.

  From then on a process that goes missing ends the others, within
  `peer_timeout` seconds and with a line that names it.

  Raises:
    RuntimeError: they could not be found.
  """
  speak_first()
  where: dict[str, Any] = {}
  if group.coordinator:
    where['coordinator_address'] = group.coordinator
  if group.processes:
    where['num_processes'] = group.processes
  if group.process_id >= 0:
    where['process_id'] = group.process_id
  # JAX ends the process with a stack trace when its own time is over.
  patience = threading.Timer(group.join_timeout, _give_up, [group])
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=2 * group.join_timeout + 60,
      heartbeat_timeout_seconds=group.peer_timeout,
    )
  except (RuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise RuntimeError(f'{_who_joins(group)}: {reason}') from error
  finally:
    patience.cancel()
  hosts = json.dumps(gather(socket.gethostname())).encode()
  os.write(2, gone.HOSTS + hosts + b'\n')


def _who_joins(group: Group) -> str:
  here = '' if group.process_id < 0 else f' {group.process_id}'
  all_of_them = f' of {group.processes}' if group.processes else ''
  return (
    f'process{here}{all_of_them}, on {socket.gethostname()}, could not join '
    f'the others at {group.coordinator or "the address that JAX found"}'
  )


def _give_up(group: Group) -> None:
  """Ends the process from a thread: the main one waits inside JAX."""
  print(
    f'error: {_who_joins(group)} within {group.join_timeout} s: not all of '
    'them are up, or the address is not that of process 0',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def speak_first() -> None:
  """Sends what C++ prints on standard error through gated_jax/gone.py."""
  reader, writer = os.pipe()
  # A session of its own: what ends this process must not end it first.
  subprocess.Popen(
    [sys.executable, '-S', '-E', str(pathlib.Path(gone.__file__))],
    stdin=reader,
    start_new_session=True,
  )
  os.close(reader)
  # Python goes on to print where it did, on a terminal perhaps.
  sys.stderr = os.fdopen(os.dup(2), 'w', buffering=1)
  os.dup2(writer, 2)
  os.close(writer)


def gather(mine: Any) -> list[Any]:
  """The JSON values of all processes, in order; all of them call this."""
  if jax.process_count() == 1:
    return [mine]
  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.array(len(text))))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(text)] = text
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(bytes(row[:size]))
    for row, size in zip(rows, sizes.ravel(), strict=True)
  ]


def first_problem(mine: str) -> str:
  """The problem of the first process that has one; '' where none has.

  A process that failed alone would leave the others waiting for it: so all
  hear of it, and all do the same about it.
  """
  return next((text for text in gather(mine) if text), '')


def until_explained(error: BaseException, peer_timeout: int) -> None:
  """Waits for the line on a lost process, if this error may come from one.

  Some networks report a broken connection at once. JAX learns which process
  is gone a little later, and then ends this one.
  """
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, jax.errors.JaxRuntimeError):
      time.sleep(peer_timeout + 10)
      return
    cause = cause.__cause__ or cause.__context__


def leave(code: int) -> None:
  """Ends this process, if it is one of several, without its goodbyes.

  JAX's own end waits for all processes, some of which may wait for this one.
  Each gets a moment to report what may be the same failure; process 0 leaves
  last, as its end is the end of the others.
  """
  if not jax.distributed.is_initialized():
    return
  time.sleep(4 if jax.process_index() == 0 else 2)
  os._exit(code)
