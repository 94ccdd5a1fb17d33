"""The tensors that files hold, beside those that their config.json asks for."""

import fnmatch
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import jax
import numpy as np

from gated_jax.config import ModelConfig
from gated_jax.hf.families import Family
from gated_jax.hf.files import TensorFiles
from gated_jax.hf.names import Shape
from gated_jax.hf.names import Tensor
from gated_jax.hf.names import tensors

_SHOWN = 5  # tensors that one message names
_LAYERS_AFTER = 16  # numbers of layers after the last one that a file may have


def set_aside(
  family: Family, config: ModelConfig, ignore: Sequence[str]
) -> list[str]:
  """Patterns of the tensors that are passed over."""
  after = range(config.depth, config.depth + _LAYERS_AFTER)
  return [
    *family.aside,
    *(p.format(layer=layer) for p in family.after for layer in after),
    *ignore,
    '*.inv_freq',
  ]


def all_narrow(
  wanted: Iterable[Tensor],
  abstract: Mapping[str, jax.ShapeDtypeStruct],
  files: TensorFiles,
) -> bool:
  """True where files hold bfloat16 for all that may be kept in it."""
  return all(
    files.dtypes[tensor.name] == 'bfloat16'
    for tensor in wanted
    if abstract[tensor.leaves[0]].dtype != np.float32
  )


def listed(
  family: Family,
  config: ModelConfig,
  shapes: Mapping[str, Shape],
  files: TensorFiles,
) -> list[Tensor]:
  """The tensors of that table of the family which the files follow best."""
  tables = [
    tensors(rows, config, shapes) for rows in (family.rows, *family.other_rows)
  ]
  return min(
    tables, key=lambda table: sum(t.name not in files.shapes for t in table)
  )


def check(
  wanted: Iterable[Tensor],
  files: TensorFiles,
  family: Family,
  aside: Sequence[str],
) -> list[str]:
  """The files hold what the table names, in these shapes, and nothing else.

  Args:
    wanted: What the table names.
    files: Of the folder.
    family: Of the model.
    aside: Patterns of tensors that need no place in the model.

  Returns:
    What is set aside, in lines.
  """
  shapes = {tensor.name: tensor.shape for tensor in wanted}
  wrong = []
  for name, shape in shapes.items():
    if name not in files.shapes:
      wrong.append(f'has no tensor {name}')
    elif files.shapes[name] != shape:
      wrong.append(
        f'tensor {name} is of shape {files.shapes[name]}, and config.json '
        f'makes it {shape}'
      )
  passed: dict[str, int] = {}
  for name in sorted(set(files.shapes) - set(shapes)):
    pattern = _first_match(name, aside)
    if pattern:
      passed[pattern] = passed.get(pattern, 0) + 1
    elif not _is_tied(name, files, family):
      wrong.append(
        f'tensor {name} of shape {files.shapes[name]} has no place in the '
        'model that config.json describes'
      )
  if wrong:
    rest = f'; and {len(wrong) - _SHOWN} more' if len(wrong) > _SHOWN else ''
    shown = '; '.join(wrong[:_SHOWN])
    raise ValueError(f'{files.folder}: {shown}{rest}')
  return [
    f'set aside, as no logits of text depend on it: {pattern} ({count})'
    for pattern, count in passed.items()
  ]


def _first_match(name: str, patterns: Iterable[str]) -> str:
  """The pattern that a name is of; '' where it is of none."""
  matches = (p for p in patterns if fnmatch.fnmatchcase(name, p))
  return next(matches, '')


def _is_tied(name: str, files: TensorFiles, family: Family) -> bool:
  """True for an output matrix that is the embedding, which some write twice."""
  by_ours = {row.ours[0]: row.theirs for row in family.rows}
  embedding = by_ours['embed/embedding']
  return name == by_ours['unembed/kernel'] and np.array_equal(
    files.read(name), files.read(embedding)
  )
