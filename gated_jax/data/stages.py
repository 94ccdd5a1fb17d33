"""The stages between files and batches, for one split of one process.

`gated_jax/data/pipeline.py` puts them together and says what for.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence

import grain

from gated_jax.config import DataConfig
from gated_jax.data.array_files import Wanted
from gated_jax.data.backcopy import BackcopySource
from gated_jax.data.batches import Ahead
from gated_jax.data.batches import Batches
from gated_jax.data.batches import InTurn
from gated_jax.data.chat import Chat
from gated_jax.data.chat import encode_conversations
from gated_jax.data.conversations import ConversationSource
from gated_jax.data.documents import DocumentStream
from gated_jax.data.documents import Reading
from gated_jax.data.documents import Selection
from gated_jax.data.encode import Encoded
from gated_jax.data.files import find_files
from gated_jax.data.hub_source import HubSource
from gated_jax.data.order import Deal
from gated_jax.data.order import Order
from gated_jax.data.packing import CutRows
from gated_jax.data.packing import JoinedRows
from gated_jax.data.packing import RowStream
from gated_jax.data.sources import Skipped
from gated_jax.data.sources import Source
from gated_jax.data.text_sources import make_text_source
from gated_jax.data.token_sources import SyntheticSource
from gated_jax.data.token_sources import TokenSource
from gated_jax.data.tokenizer import Tokenizer
from gated_jax.data.tokenizer import digest_of
from gated_jax.data.tokenizer import ends_of
from gated_jax.data.whole import WholeRows
from gated_jax.data.windows import Windows

# Rows that are not shuffled are made by so many tokens at a time, or by so many
# batches if those are smaller.
_UNSHUFFLED, _UNSHUFFLED_BATCHES = 1 << 16, 4


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
  pool: concurrent.futures.Executor | None
  chat: Chat | None = None  # for sources of conversations

  @property
  def ids_below(self) -> int:
    """The bound of ids: the model's vocabulary, or else the tokenizer's.

    A tokenizer knows nothing of ids that were made elsewhere.
    """
    return self.vocab or self.tokenizer.vocab


def batches(
  sources: list[Source], weights: list[float], view: View
) -> tuple[grain.DatasetIterator, list[Windows]]:
  """Batches made ahead of the caller; the iterators that make their windows."""
  config = view.config
  parts = [part for _, part in config.parts()]
  streams = [
    rows(part, documents(part, source, view), view)
    for part, source in zip(parts, sources, strict=True)
  ]
  size = config.shuffle_tokens // config.length
  seed = config.seed if config.shuffle and size > 1 else -1
  if seed < 0:
    size = min(
      -(-_UNSHUFFLED // config.length), _UNSHUFFLED_BATCHES * config.batch
    )

  def windows(streams: list[RowStream], weights: list[float]) -> Windows:
    """Windows of one kind, with this corpus's size and seed."""
    return Windows(streams, weights, size, seed)

  def ahead(made: Windows, batch: int) -> Ahead:
    """Windows made ahead, as many as the wanted batches have rows."""
    return Ahead(made, -(-config.prefetch * batch // size))

  if view.split == 'train':
    made = [windows(streams, weights)]
    own = config.batch // view.shards
    return Batches(ahead(made[0], own), own), made
  # Each source is a held-out set of its own.
  share = (view.shard, view.shards)
  made = [windows([stream], [1.0]) for stream in streams]
  each = [
    Batches(ahead(one, config.batch), config.batch, share, source)
    for source, one in enumerate(made)
  ]
  return each[0] if len(each) == 1 else InTurn(each, weights), made


def make_source(part: DataConfig, view: View) -> Source:
  """The source of one part of the mixture, or of the whole."""
  vocab = view.ids_below
  if part.made_up:
    backcopy = part.source == 'backcopy'
    kind = BackcopySource if backcopy else SyntheticSource
    return kind(vocab, part.length, part.seed, view.skipped)
  if part.source == 'tokens':
    tokenizer = view.tokenizer
    wanted = Wanted(
      part.eos, part.tokenizer, tokenizer.eos, digest_of(tokenizer)
    )
    files = find_files(part.paths)
    return TokenSource(files, wanted, part.max_document, view.skipped)
  if view.tokenizer.vocab > vocab:
    raise ValueError(
      f'data.tokenizer={part.tokenizer!r} has {view.tokenizer.vocab} tokens, '
      f'more than the vocabulary of {vocab}'
    )
  if part.source == 'huggingface':
    return HubSource(part, view.skipped)
  if part.source == 'conversations':
    return ConversationSource(find_files(part.paths), view.skipped)
  return make_text_source(
    part.source, part.paths, part.column, part.max_document, view.skipped
  )


def documents(
  part: DataConfig, source: Source, view: View, once: bool = False
) -> DocumentStream:
  """The documents of the view's split, this process's own ones only.

  Args:
    part: the source's own settings.
    source: what to read.
    view: which split, and which process.
    once: end after one epoch of training, too; held-out text always ends.
  """
  total = len(source.units)
  what = part.paths or part.source
  if not total:
    raise ValueError(
      f'no usable data file in {what!r}: {view.skipped.summary()}'
    )
  train = view.split == 'train'
  # If units are fewer than processes, all read all and deal documents.
  deal_units = train and total >= view.shards
  deal = Deal(
    total,
    part.seed if part.shuffle else -1,
    *((view.shard, view.shards) if deal_units else (0, 1)),
  )
  select = Selection(
    part.validation,
    not train,
    *((view.shard, view.shards) if train and not deal_units else (0, 1)),
  )

  def nothing() -> str:
    """The line for a source that has nothing for this split."""
    share = 'smaller' if train else 'larger'
    return (
      f'data.validation={part.validation} leaves no document of {what!r} for '
      f'{view.split} (process {view.shard} of {view.shards}): it takes a '
      f'{share} one, more documents, a data.max_document that cuts long ones, '
      'or data.validation=0 to hold out nothing; '
      f'{view.skipped.summary()}'
    )

  joined = part.rows == 'joined'
  reading = Reading(
    select=select,
    encode=_encoder(part, view),
    vocab=view.vocab or 2**31,
    # A document of a single id predicts nothing in a row of its own.
    least=1 if joined else 2,
    nothing=nothing,
    pool=view.pool,
    ahead=view.config.workers + 1 if view.pool else 0,
  )
  return DocumentStream(
    source, Order(deal, 0 if train and not once else 1), reading
  )


def _encoder(
  part: DataConfig, view: View
) -> Callable[[Sequence[str], Sequence[str]], Encoded]:
  """What turns a block's texts into ids."""
  if part.is_chat:
    assert view.chat is not None
    return functools.partial(
      encode_conversations, chat=view.chat, skipped=view.skipped, config=part
    )
  ends = ends_of(view.tokenizer, part.rows == 'joined')

  def plain(texts: Sequence[str], origins: Sequence[str]) -> Encoded:
    """Text is text wherever it was read."""
    del origins
    return view.tokenizer.encode_batch(texts, ends)

  return plain


def rows(part: DataConfig, documents: DocumentStream, view: View) -> RowStream:
  """The rows that `data.rows` asks for."""
  if part.rows == 'cut':
    return CutRows(documents, part.length)
  if part.rows == 'whole':
    return WholeRows(documents, part.length)
  if part.first_token >= view.ids_below:
    raise ValueError(
      f'data.first_token={part.first_token} lies outside the vocabulary of '
      f'{view.ids_below}'
    )
  return JoinedRows(documents, part.length, part.first_token)
