"""Trains a model: flags to RunConfig to training loop, and nothing else.

    python train.py --config=configs/smoke.py --workdir=runs/smoke

Any setting can follow: --config.steps=500 --config.model.depth=8; --help=model
prints those of the model, with their defaults. Started again with the same
workdir, it goes on from the newest checkpoint. On several processes, add
--distributed (TPU pods and Slurm tell the rest) or say it all:
--coordinator=host:port --processes=2 --process_id=0.
"""

import difflib
import logging
import os
import pathlib
import re
import shlex
import sys

# JAX's C++ side prints warnings before Python is heard; users can raise this.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from absl import flags
from ml_collections import config_flags

from gated_jax import cli
from gated_jax import processes
from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.explain import explain
from gated_jax.paths import expand
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu
from gated_jax.processes import Group

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'File in configs/, with --config.name=value on top.'
)
flags.DEFINE_string('workdir', '', 'Folder of the run; made when missing.')
flags.DEFINE_bool('distributed', False, 'Several processes, found by JAX.')
flags.DEFINE_string('coordinator', '', 'host:port of process 0.')
flags.DEFINE_integer('processes', 0, 'How many there are; 0: found by JAX.')
flags.DEFINE_integer('process_id', -1, 'Which one this is; -1: found by JAX.')
flags.DEFINE_integer(
  'join_timeout',
  Group().join_timeout,
  'Seconds to wait for the others.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'peer_timeout',
  Group().peer_timeout,
  'Seconds without a sign of life until another process is gone.',
  lower_bound=2,
)
flags.DEFINE_bool('debug', False, 'Show where in the code an error arose.')


class UsageError(ValueError):
  """A command line that cannot be understood."""


def read_flags(argv: list[str]) -> RunConfig:
  """Parses the command line and converts the config, once."""
  try:
    rest = FLAGS(argv)[1:]
    # A file that failed to load only says so when it is looked at.
    values = None if FLAGS.config is None else FLAGS.config.to_dict()
  except Exception as error:
    raise UsageError(_explain(error, argv)) from error
  if rest:
    raise UsageError(f'{rest[0]!r} is not a flag: flags begin with --')
  if values is None:
    raise UsageError('--config is missing, for example configs/smoke.py')
  if not FLAGS.workdir:
    raise UsageError('--workdir is missing, for example runs/smoke')
  if '://' in FLAGS.workdir:
    raise UsageError(
      f'--workdir={FLAGS.workdir} must be a folder: mount the bucket, as '
      'docs/tpu_vm.md shows'
    )
  return from_dict(values)


def _explain(error: Exception, argv: list[str]) -> str:
  """One line; the nearest setting for a mistyped --config.name."""
  text = ' '.join(str(error).replace('FATAL Flags parsing error:', '').split())
  given = _given(argv)
  path = given.get('config', '').split(':')[0]
  if path and not pathlib.Path(path).is_file():
    return f'there is no config file {path!r}'
  known = _settings()
  for flag in given:
    name = flag.removeprefix('config.')
    if name == flag or name in known:
      continue
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'; did you mean --config.{near[0]}?' if near else ''
    return f'there is no setting --{flag}{hint}'
  unknown = re.search(r'Key "(\w+)" does not exist', text)
  if unknown:
    meant = re.search(r'Did you mean "(\w+)"', text)
    hint = f'; did you mean {meant[1]}?' if meant else ''
    return f'the config file sets {unknown[1]}, which is no setting{hint}'
  if 'Traceback' in text:  # the config file itself refused, or failed
    text = str(error).strip().splitlines()[-1]
    if not text.startswith('ValueError: '):
      return f'{path} failed: {text}'
    return text.removeprefix('ValueError: ')
  if not isinstance(error, flags.Error | ValueError):
    return f'{path} failed: {type(error).__name__}: {text}'
  return text or type(error).__name__


def _given(argv: list[str]) -> dict[str, str]:
  """Flags as they were typed, with '=' or a space before their values."""
  given = {}
  for argument, following in zip(argv[1:], [*argv[2:], ''], strict=True):
    if argument.startswith('-'):
      name, equals, value = argument.lstrip('-').partition('=')
      given[name] = value if equals else following
  return given


def _settings() -> list[str]:
  from gated_jax.config import to_dict

  def names(values, path):
    for name, value in values.items():
      yield path + name
      if isinstance(value, dict):
        yield from names(value, f'{path}{name}.')

  return list(names(to_dict(RunConfig()), ''))


def main(argv: list[str]) -> int:
  """The exit code; see docs/tpu_vm.md."""
  logging.basicConfig(format='%(message)s')
  code = cli.run(lambda: train(argv), debug='--debug' in argv)
  if code not in (cli.DONE, cli.UNFINISHED):
    processes.leave(code)
  return code


def show_help(group: str | None) -> None:
  """Prints what can be typed; of a group of settings, each with its comment."""
  if group is not None:
    print(explain(group))
    return
  print(__doc__, FLAGS.main_module_help(), sep='\n')
  print(explain())


def train(argv: list[str]) -> int:
  """Trains as the command line says; returns the exit code."""
  given = _given(argv)
  for name in ('help', 'h'):
    if name in given:
      show_help(given[name] if f'--{name}={given[name]}' in argv else None)
      return cli.DONE
  config = read_flags(argv)
  skip_absent_tpu()
  group = Group(
    FLAGS.coordinator,
    FLAGS.processes,
    FLAGS.process_id,
    FLAGS.join_timeout,
    FLAGS.peer_timeout,
  )
  several = FLAGS.distributed or group[:3] != Group()[:3]
  if several:
    processes.join(group)
  check_devices()
  from gated_jax.training import loop

  command = shlex.join(sys.orig_argv)  # with the interpreter as typed
  try:
    result = loop.run(config, expand(FLAGS.workdir), command)
  except RuntimeError as error:
    if several:
      processes.until_explained(error, group.peer_timeout)
    raise
  # Of several processes, most do not know which signal another one had.
  if result.stopped_by == 'SIGINT' and not several:
    return cli.INTERRUPTED
  return cli.UNFINISHED if result.stopped_by else cli.DONE


if __name__ == '__main__':
  sys.exit(main(sys.argv))
