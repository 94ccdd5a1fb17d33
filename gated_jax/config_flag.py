"""The command line of programs that take a config, and its errors in one line.

    config_flag.read(argv, example)  # --config=FILE --config.name=value ...
    config_flag.loss_maker()  # the file's get_loss, if it has one
    config_flag.help_wanted(argv, about)  # --help or --help=model

A program defines its other flags where it is, by absl.
"""

import difflib
import pathlib
import re
import runpy
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from gated_jax.config import RunConfig
from gated_jax.config import from_dict
from gated_jax.config import to_dict
from gated_jax.explain import explain

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'File in configs/, with --config.name=value on top.'
)


def read(argv: list[str], example: str) -> RunConfig:
  """Parses the command line and converts the config, once.

  Args:
    argv: with the program's name in front.
    example: a config file, for the message that none was given.

  Raises:
    ValueError: the command line, the file or a setting cannot be understood.
  """
  try:
    rest = FLAGS(argv)[1:]
    # A file that failed to load only says so when it is looked at.
    values = None if FLAGS.config is None else FLAGS.config.to_dict()
  except Exception as error:
    raise ValueError(_reason(error, argv)) from error
  if rest:
    raise ValueError(f'{rest[0]!r} is not a flag: flags begin with --')
  if values is None:
    raise ValueError(f'--config is missing, for example {example}')
  return from_dict(values)


def loss_maker() -> Callable[[], Any] | None:
  """A function that makes the loss of the config file; None: it has none.

  The file's `get_loss` takes the same words as its `get_config`, and returns a
  loss as `gated_jax.training.loop.run` takes one. Call the maker when devices
  may be used: a loss may load a teacher. `read` comes first.

  Raises:
    ValueError: the file's `get_loss` is no function.
  """
  file = config_flags.get_config_filename(FLAGS['config'])
  path, colon, words = file.partition(':')
  get_loss = runpy.run_path(path).get('get_loss')
  if get_loss is None:
    return None
  if not callable(get_loss):
    raise ValueError(f'{path} has get_loss={get_loss!r}, which is no function')

  def make() -> Any:
    """The loss; ValueError in one line where it cannot be made."""
    try:
      loss = get_loss(*[words] * bool(colon))
    except (ValueError, RuntimeError):
      raise
    except Exception as error:
      kind = type(error).__name__
      raise ValueError(f'get_loss of {path} failed: {kind}: {error}') from error
    if not callable(loss):
      raise ValueError(
        f'get_loss of {path} made {loss!r}, which is no function'
      )
    return loss

  return make


def help_wanted(argv: list[str], about: str) -> str | None:
  """The text that --help, or --help=GROUP, asks for; None without it.

  Args:
    argv: with the program's name in front.
    about: what the program does, for the top of the page.
  """
  values = given(argv)
  for name in ('help', 'h'):
    if f'--{name}={values.get(name)}' in argv:
      return explain(values[name])
    if name in values:
      modules = [m for m in FLAGS.flags_by_module_dict() if 'absl' not in m]
      flags_help = [FLAGS.module_help(module) for module in modules]
      return '\n'.join([about, *flags_help, explain()])
  return None


def given(argv: list[str]) -> dict[str, str]:
  """Flags as they were typed, with '=' or a space before their values."""
  values = {}
  for argument, following in zip(argv[1:], [*argv[2:], ''], strict=False):
    if argument.startswith('-'):
      name, equals, value = argument.lstrip('-').partition('=')
      values[name] = value if equals else following
  return values


def _reason(error: Exception, argv: list[str]) -> str:
  """One line; the nearest setting for a mistyped --config.name."""
  text = ' '.join(str(error).replace('FATAL Flags parsing error:', '').split())
  typed = given(argv)
  path = typed.get('config', '').split(':')[0]
  if path and not pathlib.Path(path).is_file():
    return f'there is no config file {path!r}'
  known = list(_names(to_dict(RunConfig()), ''))
  for flag in typed:
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


def _names(values: dict[str, Any], path: str) -> Iterator[str]:
  """Every setting and group of settings, as flags write them."""
  for name, value in values.items():
    yield path + name
    if isinstance(value, dict):
      yield from _names(value, f'{path}{name}.')
