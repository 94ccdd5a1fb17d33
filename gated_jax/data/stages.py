"""The stages between files and batches, for one split of one process.

`gated_jax/data/pipeline.py` puts them together and says what for.
"""

import dataclasses
import functools

import grain
import numpy as np
from grain import experimental

from gated_jax.config import DataConfig
from gated_jax.data.documents import Documents
from gated_jax.data.documents import content_hash
from gated_jax.data.documents import is_held_out
from gated_jax.data.packing import JoinedRows
from gated_jax.data.packing import PackedRows
from gated_jax.data.sources import Document
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.sources import find_files
from gated_jax.data.text_sources import make_text_source
from gated_jax.data.token_sources import SyntheticSource
from gated_jax.data.token_sources import TokenSource
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import document

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class View:
  """Which documents are wanted, and what the model can take."""

  config: DataConfig
  split: str
  shard: int
  shards: int
  vocab: int
  tokenizer: Tokenizer
  skipped: Skipped


def batches(rows: grain.IterDataset, view: View) -> grain.IterDataset:
  """Shuffled within the window, stacked, and made ahead of the caller."""
  config = view.config
  window = config.shuffle_tokens // config.length
  if config.shuffle and window > 1:
    # Read a whole window ahead: while one is used the next is made.
    rows = _Ahead(rows, prefetch_buffer_size=window)
    rows = experimental.WindowShuffleIterDataset(
      rows, window_size=window, seed=config.seed
    )
  if view.split == 'train':
    batches = rows.batch(config.batch // view.shards, drop_remainder=True)
  else:
    batches = rows.batch(config.batch, drop_remainder=False)
    batches = batches.map(functools.partial(_own_rows, view=view))
  return _Ahead(batches, prefetch_buffer_size=config.prefetch)


class _Ahead(experimental.ThreadPrefetchIterDataset):
  """Grain's reading ahead by a thread, whose iterator may be closed twice."""

  def __iter__(self) -> grain.DatasetIterator:
    return _AheadIterator(self._parent.__iter__(), self._prefetch_buffer_size)


class _AheadIterator(experimental.ThreadPrefetchDatasetIterator):
  # It is closed again when it is collected, which at the interpreter's end is
  # after the modules that closing needs.
  def close(self) -> None:
    if not self._closed:
      super().close()


def _own_rows(batch: Batch, view: View) -> Batch:
  """This process's rows of a global batch, the last one padded to its size."""
  size = view.config.batch // view.shards
  begin = view.shard * size
  count = len(batch['weights'])
  rows = np.arange(begin, begin + size)
  if count >= begin + size:
    return {name: value[begin : begin + size] for name, value in batch.items()}
  # Without document numbers nothing but its weight marks padding, so what is
  # measured inside the model had better be text: earlier rows again.
  joined = 'segments' not in batch
  out = {}
  for name, value in batch.items():
    own = value[rows % count]
    if name == 'weights' or not joined:
      own[rows >= count] = 0
    out[name] = own
  return out


def make_source(part: DataConfig, view: View) -> Source:
  """The source of one part of the mixture, or of the whole."""
  vocab = view.vocab or view.tokenizer.vocab
  if part.source == 'synthetic':
    return SyntheticSource(vocab, part.length, part.seed, view.skipped)
  if part.source == 'tokens':
    return TokenSource(
      find_files(part.paths),
      view.tokenizer.eos,
      part.max_document,
      view.skipped,
    )
  if view.tokenizer.vocab > vocab:
    raise ValueError(
      f'data.tokenizer={part.tokenizer!r} has {view.tokenizer.vocab} tokens, '
      f'more than the vocabulary of {vocab}'
    )
  return make_text_source(
    part.source, part.paths, part.column, part.max_document, view.skipped
  )


def documents(
  part: DataConfig, source: Source, view: View
) -> grain.IterDataset:
  """The documents of the view's split, this process's own ones only."""
  total = len(source.units)
  what = part.paths or part.source
  if not total:
    raise ValueError(
      f'no usable data file in {what!r}: {view.skipped.summary()}'
    )
  order = grain.MapDataset.range(total)
  if part.shuffle:
    order = order.shuffle(part.seed)
  train = view.split == 'train'
  # With fewer units than processes all read all of them and deal documents.
  deal_units = train and total >= view.shards
  if deal_units:
    order = order[view.shard :: view.shards]
  epoch = len(order)
  if train:
    order = order.repeat()
  deal = train and not deal_units

  def keep(found: Document) -> bool:
    side, dealt = content_hash(found)
    if is_held_out(side, float(part.validation)) == train:
      return False
    return not deal or dealt % view.shards == view.shard

  def nothing() -> str:
    return (
      f'data.validation={part.validation} leaves no document of {what!r} for '
      f'{view.split} (process {view.shard} of {view.shards}); '
      f'{view.skipped.summary()}'
    )

  return Documents(
    source,
    order,
    epoch,
    keep,
    functools.partial(_encode, view),
    nothing,
    # In rows of their own, documents of a single id predict nothing.
    least=1 if part.rows == 'joined' else 2,
  )


def pack(
  part: DataConfig, documents: grain.IterDataset, view: View
) -> grain.IterDataset:
  """The rows that `data.rows` asks for."""
  if part.rows == 'cut':
    return PackedRows(documents, part.length)
  vocab = view.vocab or view.tokenizer.vocab
  if part.first_token >= vocab:
    raise ValueError(
      f'data.first_token={part.first_token} lies outside the vocabulary of '
      f'{vocab}'
    )
  return JoinedRows(documents, part.length, part.first_token)


def _encode(view: View, found: Document) -> np.ndarray:
  """Ids of a document, checked against the vocabulary."""
  if found.ids is None:
    if not found.text:
      return np.empty(0, np.int32)
    ids = document(view.tokenizer, found.text)
    # Where one token serves both ends, one of it stands between documents.
    shared = view.tokenizer.bos == view.tokenizer.eos >= 0
    return ids[1:] if shared and view.config.rows == 'joined' else ids
  low, high = int(found.ids.min()), int(found.ids.max())
  vocab = view.vocab or 2**31
  if low < 0 or high >= vocab:
    raise ValueError(
      f'token id {low if low < 0 else high} in {found.origin} lies outside '
      f'the vocabulary of {vocab}'
    )
  return found.ids.astype(np.int32, copy=False)
