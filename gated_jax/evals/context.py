"""How far back a checkpoint reads: loss by position, retrieval by length.

    python -m gated_jax.evals.context --checkpoint=runs/long \
      --lengths=1024,2048,4096 --out=runs/long/context.json --name=yarn \
      --config.model.rope.scaling=yarn --config.model.rope.factor=2 \
      --config.model.rope.original_length=2048

Settings are those of the checkpoint's run, but for the ones that follow as
`--config.name=value`: a model is measured under another rotation than it was
trained with. The held-out text of the run comes in joined rows of the largest
length; `retrieval.py` has the tasks, `report.py` draws the file that --out
names, to which each --name adds its figures.
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array
from jaxtyping import Float

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import paths
from gated_jax import sharding
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.config import override
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.tokenizer import make_tokenizer
from gated_jax.evals.puzzles import TASKS
from gated_jax.evals.retrieval import Form
from gated_jax.evals.retrieval import recall
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.paths import Path
from gated_jax.platform import skip_absent_tpu

ROWS = 4  # Rows of a batch, at every length
BINS = 32  # places in a row for which a loss is given


def loss_by_position(
  model: nn.Module, params: Any, batches: Iterable[dict[str, Any]]
) -> Float[np.ndarray, ' T']:
  """Mean nats per token at each place of a row; NaN where nothing counts.

  Args:
    model: gives logits [B, T, V] of tokens [B, T], as `Decoder` does.
    params: its parameters.
    batches: of joined rows, which are one document to the model.
  """
  nats, number = np.zeros(1), np.zeros(1)
  for batch in batches:
    part = _sums(model, params, batch)
    nats = nats + np.asarray(part[0], np.float64)
    number = number + np.asarray(part[1], np.float64)
  with np.errstate(invalid='ignore'):
    return np.asarray(nats / number)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
  model: nn.Module, params: Any, batch: dict[str, Any]
) -> tuple[Float[Array, ' T'], Float[Array, ' T']]:
  """Nats and weights of a batch, added up over its rows."""
  logits: Any = model.apply({'params': params}, batch['tokens'])
  logits = jax.nn.log_softmax(logits.astype(jnp.float32))
  chosen = jnp.take_along_axis(logits, batch['targets'][..., None], axis=-1)
  nats = -chosen[..., 0] * batch['weights']
  return nats.sum(axis=0), batch['weights'].sum(axis=0)


def binned(values: Float[np.ndarray, ' T'], bins: int) -> list[list[float]]:
  """[last place, mean] of equal parts of a row."""
  parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
  return [
    [int(part[-1]) + 1, float(f'{np.nanmean(values[part]):.5g}')]
    for part in parts
  ]


def measure(
  config: RunConfig, lengths: Sequence[int], rows: int, path: str
) -> dict[str, Any]:
  """Figures of a checkpoint under these settings, for JSON.

  Args:
    config: of the run, with what is changed; `eval_batches` says how much text.
    lengths: of the texts of retrieval; rows of held-out text have the largest.
    rows: of each task, length and depth.
    path: of the checkpoint.
  """
  longest = max(lengths)
  model_config = dataclasses.replace(config.model, length=longest)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  model = Decoder(model_config)
  start = (config.data.first_token,) if config.data.first_token >= 0 else ()
  encode = make_tokenizer(config.data.tokenizer).encode
  with sharding.activate(mesh):
    abstract = abstract_parameters(model_config, mesh)
    params = checkpoint.load_parameters(path, abstract)
    losses = loss_by_position(model, params, _held_out(config, longest))
    tasks = {}
    for task in TASKS:
      found = recall(
        model, params, encode, lengths, rows=rows, form=Form(task, start)
      )
      tasks[task] = {
        str(length): float(f'{row.mean():.4g}')
        for length, row in zip(lengths, found.accuracy, strict=True)
      }
  return {'loss': binned(losses, BINS), 'retrieval': tasks}


def _held_out(config: RunConfig, length: int) -> Iterable[dict[str, Any]]:
  """Held-out rows of this length, in as many batches as a run measures."""
  data = dataclasses.replace(config.data, batch=ROWS, length=length)
  vocab = config.model.vocab
  with make_pipeline(data, 'validation', vocab=vocab) as batches:
    for batch, _ in zip(batches, range(config.eval_batches), strict=False):
      yield batch


def table(figures: dict[str, Any]) -> str:
  """Loss by quarter of a row, then a line for each task."""
  losses = np.array(figures['loss'])
  lines = [
    f'loss to position {part[-1, 0]:.0f}: {part[:, 1].mean():.4f}'
    for part in np.array_split(losses, 4)
  ]
  for task, row in figures['retrieval'].items():
    cells = '  '.join(f'{length}: {share:.0%}' for length, share in row.items())
    lines.append(f'{task}  {cells}')
  return '\n'.join(lines)


def add(path: Path, name: str, figures: dict[str, Any]) -> None:
  """Puts the figures under their name into a JSON file, which may be there."""
  known = json.loads(paths.read_bytes(path)) if paths.is_file(path) else {}
  if not paths.in_bucket(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(known | {name: figures}, separators=(',', ':'))
  paths.write_bytes(path, f'{text}\n'.encode())


def _lengths(text: str) -> list[int]:
  """The lengths of '1024,2048'."""
  words = text.split(',')
  if not all(word.isdecimal() and int(word) > 0 for word in words):
    raise ValueError(f'--lengths={text!r} must be lengths such as 1024,2048')
  return sorted({int(word) for word in words})


def main(argv: list[str]) -> None:
  """The command."""
  skip_absent_tpu()
  parser = cli.Parser(
    prog='python -m gated_jax.evals.context',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--lengths', required=True, help='1024,2048')
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--name', default='as trained')
  parser.add_argument('--out', type=paths.expand)
  options, words = parser.parse_known_args(argv)
  lengths = _lengths(options.lengths)
  if options.rows < 1:
    raise ValueError(f'--rows={options.rows} must be positive')
  run = checkpoint.load_config(options.checkpoint)
  config = override(dataclasses.replace(run, mesh=MeshConfig()), words)
  if config.data.rows != 'joined':
    raise ValueError(
      f'data.rows={config.data.rows!r}: a place in a row is a distance from '
      "the beginning of the text only where data.rows='joined'"
    )
  if options.out:
    paths.check_bucket(options.out)
  figures = measure(config, lengths, options.rows, options.checkpoint)
  print(table(figures))
  if options.out:
    add(options.out, options.name, figures)


if __name__ == '__main__':
  sys.exit(cli.run(lambda: main(sys.argv[1:])))
