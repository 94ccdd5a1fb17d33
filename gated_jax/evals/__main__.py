"""Measures a checkpoint: loss, perplexity, bits per byte, sinks and gates.

    python -m gated_jax.evals --checkpoint=runs/smoke
    python -m gated_jax.evals --checkpoint=runs/smoke --figures=out \
      --config.data.source=text --config.data.paths='~/books/*.txt'

Settings are those of the checkpoint's run, but for the ones that follow as
`--config.name=value`, and for the mesh, which is of all devices that are here.
Without other data, the text that the run held out is read, as much of it as the
run itself reads. Other data is read whole, up to `--config.eval_batches`. The
exit code is 2 for what the user has to change, 1 for other failures.
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import argparse
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gated_jax import checkpoint
from gated_jax import cli
from gated_jax import paths
from gated_jax import sharding
from gated_jax.config import DataConfig
from gated_jax.config import MeshConfig
from gated_jax.config import RunConfig
from gated_jax.config import override
from gated_jax.data.pipeline import make_pipeline
from gated_jax.evals import diagnostics
from gated_jax.evals.likelihood import Likelihood
from gated_jax.evals.likelihood import evaluate
from gated_jax.evals.likelihood import target_bytes
from gated_jax.model.abstract import abstract_parameters
from gated_jax.model.decoder import Decoder
from gated_jax.model.size import check_fits
from gated_jax.paths import Path
from gated_jax.paths import expand
from gated_jax.platform import check_devices
from gated_jax.platform import skip_absent_tpu

# The largest share below one: every document is held out.
EVERYTHING = 1 - 2**-53
PROBED = 2  # batches that the probes look at, as while training


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
  """The command line, and the settings that it changes."""
  parser = cli.Parser(
    prog='python -m gated_jax.evals',
    description=(__doc__ or '').split('\n', maxsplit=1)[0],
    epilog='Settings of the run can follow: --config.data.paths=... .',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--checkpoint', required=True, help='a run, or the folder of a step'
  )
  parser.add_argument(
    '--figures', default='', help='folder for figures; default: none are drawn'
  )
  flags, words = parser.parse_known_args(argv)
  run = checkpoint.load_config(flags.checkpoint)
  plain = dataclasses.replace(run, mesh=MeshConfig())
  config = override(plain, words)
  if is_other_data(run.data, config.data):
    held_out = any('--config.data.validation' in word for word in words)
    share = config.data.validation if held_out else EVERYTHING
    data = dataclasses.replace(config.data, validation=share)
    config = dataclasses.replace(config, data=data)
  return flags, config


def is_other_data(old: DataConfig, new: DataConfig) -> bool:
  """Tells whether new settings read other documents than a run did."""
  return any(
    getattr(old, name) != getattr(new, name)
    for name in ('source', 'paths', 'column', 'mixture')
  )


class Batches:
  """The first batches to measure, with what is learned while they are read.

  Attributes:
    first: A few of them, for the probes.
    text_bytes: Bytes of text that the targets encode; 0: not known.
    complete: Whether no further batches were left.
    source: What the last batch was from.
  """

  def __init__(self, config: RunConfig, mesh: jax.sharding.Mesh):
    self._config, self._mesh = config, mesh
    self.first: list[dict[str, Any]] = []
    self.count = 0
    self.text_bytes = 0.0
    self.complete = False
    self.source = ''

  def __iter__(self) -> Iterator[dict[str, Any]]:
    data, limit = self._config.data, self._config.eval_batches
    where, known = sharding.batch_sharding(self._mesh), True
    vocab = self._config.model.vocab
    with make_pipeline(data, 'validation', vocab=vocab) as batches:
      lengths = batches.tokenizer.byte_lengths()
      for batch in batches:
        if self.count == limit:
          break
        self.count += 1
        size = target_bytes(data, [batch], lengths)
        known = known and size > 0
        self.text_bytes = (self.text_bytes + size) * known
        self.source = batches.source
        placed = jax.device_put(batch, where)
        if len(self.first) < PROBED:
          self.first.append(placed)
        yield placed
      else:
        self.complete = True


def describe(result: Likelihood, batches: Batches, config: RunConfig) -> str:
  """The table of figures, without those that are not known."""
  rows = [
    ('data', config.data.paths or config.data.source),
    ('documents', documents_of(config.data)),
    ('batches', f'{batches.count:,}' + ', all there are' * batches.complete),
    ('tokens', f'{result.tokens:,.0f}'),
    ('loss', f'{result.loss:.4f} nats per token'),
    ('perplexity', f'{result.perplexity:.4f}'),
  ]
  for name, loss in result.by_source.items():
    rows.append((f'loss of {name}', f'{loss:.4f}'))
  if not math.isnan(result.bits_per_byte):
    rows.append(('bits per byte', f'{result.bits_per_byte:.4f}'))
  return table(rows)


def documents_of(data: DataConfig) -> str:
  """Says which documents are measured."""
  if data.validation == EVERYTHING:
    return 'all'
  return f'{data.validation:.2%}, held out by their content'


def table(rows: list[tuple[str, str]]) -> str:
  """Names and values in two columns."""
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def by_layer(report: diagnostics.Report) -> str:
  """A Markdown table of what each layer does."""
  columns = {
    'first-token attention': report.first_token,
    'largest activation': report.activation,
    'mean gate': report.gate_mean,
    'gates below 0.1': report.gate_below,
    'gate logit norm': report.gate_norm,
  }
  shown = {
    name: values.reshape(len(values), -1).mean(axis=1)
    for name, values in columns.items()
    if len(values)
  }
  lines = [
    f'| layer | {" | ".join(shown)} |',
    '|---' * (len(shown) + 1) + '|',
  ]
  for layer in range(max((len(x) for x in shown.values()), default=0)):
    cells = [
      f'{values[layer]:.4f}' if layer < len(values) else ''
      for values in shown.values()
    ]
    lines.append(f'| {layer} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw(report: diagnostics.Report, folder: Path) -> str:
  """Writes figures; says where they are, or why there are none."""
  try:
    from gated_jax.evals import plot

    files = plot.figures(folder / 'metrics.jsonl', report, folder)
  except ImportError:
    return "none: matplotlib is missing, pip install 'gated_jax[plot]'"
  return f'{folder} ({", ".join(path.name for path in files)})'


def run(flags: argparse.Namespace, config: RunConfig) -> None:
  """Reads the parameters, measures, prints."""
  if flags.figures and paths.is_file(expand(flags.figures)):
    raise ValueError(f'--figures={flags.figures} must be a folder')
  check_devices()
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  sharding.check_batch(mesh, config.data.batch, config.data.length, 1)
  check_fits(config.model, jax.devices())
  model = Decoder(config.model)
  with sharding.activate(mesh):
    abstract = abstract_parameters(config.model, mesh)
    params = checkpoint.load_parameters(flags.checkpoint, abstract)
    batches = Batches(config, mesh)
    sources = iter(lambda: batches.source, None)
    sums = evaluate(model, params, batches, sources=sources)
    result = dataclasses.replace(sums, text_bytes=batches.text_bytes)
    print(describe(result, batches, config), flush=True)
    report = diagnostics.probe(model, params, batches.first)
  figures = [
    (name, form.format(value))
    for name, value, form in report.summary()
    if np.isfinite(value)
  ]
  print(f'{table(figures)}\n\n{by_layer(report)}')
  if flags.figures:
    print(f'\nfigures  {draw(report, expand(flags.figures))}')


def main(argv: list[str]) -> int:
  """The exit code; see gated_jax/cli.py."""
  skip_absent_tpu()
  return cli.run(lambda: run(*read_flags(argv)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
