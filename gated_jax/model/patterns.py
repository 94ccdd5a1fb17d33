"""Parameters chosen by patterns over their paths.

A pattern is a path as a checkpoint names it, such as
`layers/attention/query/kernel`. A `*` in it stands for any characters, slashes
too, a `?` for one of them, and a pattern that ends early takes all that lies
below: `embed` is `embed/*`. Several are written with commas between them and
read in order; one that begins with `!` takes parameters away again, from all
of them where it comes first:

    */gate                the gates
    */mlp,*/attention     every MLP and every attention, gates included
    !embed,!unembed       all but the two tables of the vocabulary
    layers_26,layers_27   two layers of an unscanned model
"""

import difflib
import fnmatch
from collections.abc import Collection

Path = tuple[str, ...]


def _split(patterns: str) -> list[str]:
  """The patterns of a setting, without the spaces around them."""
  return [pattern.strip() for pattern in patterns.split(',')]


def _matches(pattern: str, path: Path) -> bool:
  """True where one pattern takes a path, or a folder that it lies in."""
  name = '/'.join(path)
  return any(
    fnmatch.fnmatchcase(name, form) for form in (pattern, f'{pattern}/*')
  )


def chosen(patterns: str, path: Path) -> bool:
  """True where the patterns, read in order, end up with this path."""
  words = _split(patterns)
  result = words[0].startswith('!')
  for word in words:
    if _matches(word.removeprefix('!'), path):
      result = not word.startswith('!')
  return result


def choose(
  setting: str, patterns: str, paths: Collection[Path]
) -> frozenset[Path]:
  """The paths that patterns choose.

  Args:
    setting: the patterns' own name, for messages.
    patterns: with commas between them.
    paths: all that there are.

  Raises:
    ValueError: a pattern matches nothing, or nothing is left.
  """
  for word in _split(patterns):
    if not any(_matches(word.removeprefix('!'), path) for path in paths):
      raise ValueError(
        f'{setting}={patterns!r}: {word!r} matches no parameter'
        f'{_hint(word, paths)}'
      )
  result = frozenset(path for path in paths if chosen(patterns, path))
  if not result:
    raise ValueError(f'{setting}={patterns!r} leaves no parameter')
  return result


def _hint(word: str, paths: Collection[Path]) -> str:
  """The nearest names, or why a layer of a scanned model has none."""
  stacked = any(path[0] == 'layers' for path in paths)
  if stacked and word.lstrip('!*/').startswith('layers_'):
    return (
      '; a scanned model keeps its layers in one array: set model.scan=False '
      'to choose among them'
    )
  names = {
    '/'.join(path[start:end])
    for path in paths
    for start in range(len(path))
    for end in range(start + 1, len(path) + 1)
  }
  near = difflib.get_close_matches(word.strip('!*/'), sorted(names), 3, 0.5)
  return f'; the nearest names are {", ".join(near)}' if near else ''
