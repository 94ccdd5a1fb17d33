"""Shows what a run would read, before it is run.

Documents are counted as they stream by, so that a corpus of any size needs no
more memory than a run's own pipeline. Without --tokens all of it is read.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gated_jax.config import DataConfig
from gated_jax.data.pipeline import make_pipeline
from gated_jax.data.pipeline import make_view
from gated_jax.data.sources import Source
from gated_jax.data.stages import View
from gated_jax.data.stages import documents
from gated_jax.data.stages import make_source
from gated_jax.data.tokenizer import Tokenizer

BAR = 40  # characters of the histogram's longest bar
SHOWN = 72  # characters of a segment's text at most


@dataclasses.dataclass
class Count:
  """Documents of one source on one side of the held-out split."""

  documents: int = 0
  tokens: int = 0
  longest: int = 0
  shortest: int = 0
  complete: bool = True  # False: there are more than were read
  # Documents of 2**i to 2**(i + 1) - 1 tokens.
  by_length: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(48, np.int64)
  )

  def add(self, lengths: np.ndarray) -> None:
    """Counts documents of these lengths."""
    if not len(lengths):
      return
    least = int(lengths.min())
    self.shortest = min(self.shortest, least) if self.documents else least
    self.longest = max(self.longest, int(lengths.max()))
    self.documents += len(lengths)
    self.tokens += int(lengths.sum())
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    self.by_length += np.bincount(powers, minlength=len(self.by_length))

  def describe(self) -> str:
    """One line."""
    more = '' if self.complete else ', and more that was not read'
    mean = self.tokens / max(self.documents, 1)
    return (
      f'{self.documents:,} documents, {self.tokens:,} tokens '
      f'({self.shortest:,} to {self.longest:,} a document, {mean:,.1f} on '
      f'average){more}'
    )

  def histogram(self) -> Iterator[str]:
    """A line for every power of two between the shortest and the longest."""
    used = np.flatnonzero(self.by_length)
    most = self.by_length.max(initial=1)
    for power in range(used[0], used[-1] + 1) if len(used) else ():
      number = int(self.by_length[power])
      bar = '#' * -(-BAR * number // int(most))
      border = f'{1 << power:,} to {(2 << power) - 1:,}'
      yield f'    {border:>24}  {number:>12,}  {bar}'.rstrip()


def count(part: DataConfig, source: Source, view: View, most: int) -> Count:
  """Reads documents of one source once through, or up to so many tokens.

  Args:
    part: the source's own settings.
    source: files, or what makes documents without any.
    view: which side of the held-out split.
    most: tokens after which nothing more is read; 0: no bound.

  Raises:
    ValueError: there is no document, or one that cannot be used.
  """
  counted = Count()
  for chunk in documents(part, source, view, once=True):
    counted.add(chunk.lengths)
    if most and counted.tokens >= most:
      counted.complete = False
      break
  return counted


def look(
  config: DataConfig, vocab: int, most: int = 0, rows: int = 2
) -> Iterator[str]:
  """Lines on sources, documents, the first rows and what was skipped.

  Args:
    config: of the run.
    vocab: the model's.
    most: tokens of each source and split that are read; 0: all.
    rows: of the first batch to show.

  Raises:
    ValueError: as a run would, for what has to be changed.
  """
  splits = ('train', 'validation') if config.validation else ('train',)
  views = {split: make_view(config, split, vocab=vocab) for split in splits}
  tokenizer = views['train'].tokenizer
  yield f'tokenizer  {tokenizer.name}, {tokenizer.vocab:,} tokens'
  total = sum(weight for weight, _ in config.parts())
  names = config.names()
  for name, (weight, part) in zip(names, config.parts(), strict=True):
    source = make_source(part, views['train'])
    files = len({unit.path for unit in source.units})
    yield f'\n{name}  {weight / total:.1%} of all rows, {files:,} files'
    for split, view in views.items():
      try:
        counted = count(part, source, view, most)
      except ValueError as error:
        yield f'  {split}: {error}'
        continue
      yield f'  {split}: {counted.describe()}'
      if split == 'train':
        yield from counted.histogram()
  yield from _first_rows(config, vocab, rows)
  if views['train'].chat is not None:
    yield (
      f'\nshortened  {views["train"].skipped.shortened:,} conversations, to '
      'the last tokens that fit into a row'
    )
  skipped = views['train'].skipped.report()
  yield f'\nskipped  {len(skipped):,} files, or parts of files'
  for where, reason in list(skipped.items())[:10]:
    yield f'  {where}: {reason}'


def _first_rows(config: DataConfig, vocab: int, rows: int) -> Iterator[str]:
  """The first rows of the first batch, and how full all of its rows are."""
  with make_pipeline(config, 'train', vocab=vocab) as pipeline:
    batch = next(pipeline)
    share, padding = batch['weights'].mean(), pipeline.padding
  yield (
    f'\nrows  data.rows={config.rows!r} of {config.length:,} tokens, '
    f'{config.batch} a batch; {share:.1%} of the first batch are targets, '
    f'{padding:.2%} of the first window is padding'
  )
  for number in range(min(rows, config.batch)):
    row = {name: values[number] for name, values in batch.items()}
    targets = int(row['weights'].sum())
    yield f'  row {number}: {targets:,} of {config.length:,} are targets'
    yield from _segments(row, pipeline.tokenizer)


def _segments(
  row: dict[str, np.ndarray], tokenizer: Tokenizer
) -> Iterator[str]:
  """A line for each document of a row, or one for all that is joined."""
  numbers = row.get('segments', np.ones(len(row['tokens']), np.int32))
  for segment in range(1, int(numbers.max()) + 1):
    own = np.flatnonzero(numbers == segment)
    text = repr(tokenizer.decode(row['tokens'][own]))
    if len(text) > SHOWN:
      text = f'{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}'
    yield f'    | {own[0]:,} to {own[-1]:,}  {text}'
  padding = int((numbers == 0).sum())
  if padding:
    yield f'    | {padding:,} places of padding'
