"""The other door to train.py, for an installed package.

    python -m gated_jax.train --config=smoke --workdir=runs/smoke

A config without a folder and an ending is one of those that come with the
package. Every flag is described in train.py, which a wheel carries as it does
configs/ (see setup.py); in a checkout both stand beside the package.
"""

import pathlib
import sys

PACKAGE = pathlib.Path(__file__).parents[1]


def home() -> pathlib.Path:
  """The folder that train.py and configs/ lie in."""
  shipped = PACKAGE / 'shipped'
  return shipped if shipped.is_dir() else PACKAGE.parent


def with_path(argument: str, configs: pathlib.Path) -> str:
  """`--config=smoke` with the file that it means; others as they are.

  Args:
    argument: one word of the command line.
    configs: the folder of the shipped configs.

  Raises:
    ValueError: the folder has no such file.
  """
  name, equals, value = argument.partition('=')
  stem, colon, words = value.partition(':')
  if name.lstrip('-') != 'config' or not equals or not stem.isidentifier():
    return argument
  path = configs / f'{stem}.py'
  if not path.is_file():
    known = sorted(p.stem for p in configs.glob('[!_]*.py'))
    raise ValueError(
      f'--config={stem} is neither a file nor one of {", ".join(known)}'
    )
  return f'{name}={path}{colon}{words}'


def main(argv: list[str]) -> int:
  """Runs train.py; returns its exit code."""
  sys.path.insert(0, str(home()))
  import train
  from gated_jax import cli

  try:
    arguments = [with_path(a, home() / 'configs') for a in argv]
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return cli.REFUSED
  return train.main(arguments)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
