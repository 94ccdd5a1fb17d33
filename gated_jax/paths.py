"""Paths as people type them: one rule for every command and every setting."""

import os
import pathlib


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
  """The path that was typed, with `~` and `~name` as home folders.

  A relative path stays relative, so that it is printed as it was typed.

  Raises:
    ValueError: there is no such user.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise ValueError(f'{os.fspath(path)!r}: there is no such user') from None
