"""Says in one line which process of a run is gone, before JAX's stack trace.

Once JAX misses another process it ends this one, from a thread where no Python
runs, with a stack trace of C++. So the standard error of a run of several
processes passes through this program, which copies it and puts that line
first. It imports nothing of the package: it starts in an instant, and goes on
while the process that it speaks for is dying.

    python gone.py < pipe
"""

import json
import os
import re
import select

# The first words of JAX's that mean the end: process 0 lists who stopped to
# answer, the others are told that they will be ended.
MARK = re.compile(
  rb'tasks are unhealthy|JAX distributed service detected fatal errors'
)
TASKS = re.compile(rb'tasks are unhealthy[^\n]*\n((?:[^\n]*?\d+\n)+)')
# Begins a line that is not copied: JSON, the host of every process.
HOSTS = b'\0hosts '
PATIENCE = 2.0  # seconds for the rest of the stack trace


def explain(text: bytes, hosts: list[str]) -> str:
  """The line for what JAX says when it ends a process.

  Args:
    text: the message, in which JAX lists processes that stopped to answer. It
      lists none where process 0 itself, which keeps the list, is gone.
    hosts: by process; may be empty.
  """
  listed = TASKS.search(text)
  numbers = (
    [int(x) for x in re.findall(rb'\d+(?=\n)', listed[1])] if listed else [0]
  )
  names = [
    f'process {i}' + (f' on {hosts[i]}' if i < len(hosts) else '')
    for i in numbers
  ]
  verb, possessive = ('is', 'its') if len(names) == 1 else ('are', 'their')
  return (
    f'error: {", ".join(names)} {verb} gone: {possessive} own output says why, '
    'if anything does; start the same command again on all hosts, and the run '
    'goes on from its newest checkpoint'
  )


def _wait(seconds: float) -> bool:
  """Waits some seconds for something to read, or the end; says if it came."""
  return bool(select.select([0], [], [], seconds)[0])


def _copy(data: bytes) -> None:
  try:
    while data:
      data = data[os.write(2, data) :]
  except OSError:  # nobody reads it any more
    pass


def main() -> None:
  """Copies standard input to standard error until its end."""
  hosts: list[str] = []
  held = b''
  while True:
    # A line that is not whole is held for a moment: it may be a mark's half.
    if held and not MARK.search(held) and not _wait(0.2):
      _copy(held)
      held = b''
    if MARK.search(held) and not _wait(PATIENCE):
      break
    chunk = os.read(0, 1 << 16)
    if not chunk:
      break
    held += chunk
    while b'\n' in held:
      line, _, rest = held.partition(b'\n')
      if MARK.search(line):
        break
      held = rest
      if line.startswith(HOSTS):
        hosts = json.loads(line[len(HOSTS) :])
      else:
        _copy(line + b'\n')
  if MARK.search(held):
    _copy(explain(held, hosts).encode() + b'\n')
  _copy(held)
  while chunk := os.read(0, 1 << 16):
    _copy(chunk)


if __name__ == '__main__':
  main()
