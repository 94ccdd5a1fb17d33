"""Makes the next command out of the one that was typed, with other flags."""

import shlex

from gated_jax import paths
from gated_jax.paths import Path

# Stands for the command of a run that was started from Python.
CALL = 'gated_jax.training.loop.run(config, workdir)'


def _with(command: str, **flags: object) -> str:
  """A command with flags of other values, or added at its end."""
  words = []
  old = iter(shlex.split(command))
  for word in old:
    name, equals, _ = word.lstrip('-').partition('=')
    if not word.startswith('-') or name not in flags:
      words.append(word)
    elif not equals:
      next(old, None)  # its value is a word of its own
  words += [f'--{name}={value}' for name, value in flags.items()]
  return shlex.join(words)


def again(command: str) -> str:
  """Goes on with a run that was stopped."""
  return command or f'{CALL} with the same arguments'


def longer(command: str, steps: int) -> str:
  """Goes on with a run that has reached its last step."""
  if not command:
    return f'{CALL} with config.steps={steps} and the same workdir'
  return _with(command, **{'config.steps': steps})


def anew(command: str, workdir: Path, weights: Path) -> str:
  """Starts a new run from the weights of a checkpoint.

  Args:
    command: as typed; '': the run was started from Python.
    workdir: of the run that has the checkpoint.
    weights: the checkpoint.
  """
  number = 2
  while paths.exists(new := workdir.with_name(f'{workdir.name}_{number}')):
    number += 1
  if not command:
    return (
      f'{CALL} with config.init_from={str(weights)!r} and workdir={str(new)!r}'
    )
  return _with(command, **{'workdir': new, 'config.init_from': weights})
