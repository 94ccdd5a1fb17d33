"""Settings of the data that a run reads."""

import dataclasses
import math
from typing import ClassVar

from gated_jax.config.checks import below_one
from gated_jax.config.checks import choice
from gated_jax.config.checks import finite
from gated_jax.config.checks import positive
from gated_jax.config.checks import valid_seed
from gated_jax.config.roles import setting

# Kinds of data that a run can read; see gated_jax/data/sources.py.
SOURCES = (
  'stdlib',
  'text',
  'jsonl',
  'parquet',
  'array_record',
  'huggingface',
  'conversations',
  'tokens',
  'synthetic',
  'backcopy',
)
# Those whose ids stand for no text and come from no file.
MADE_UP = ('synthetic', 'backcopy')
# How documents become rows; see gated_jax/data/packing.py.
ROWS = ('cut', 'joined', 'whole')
# The turns of a conversation that are learned, and the ways to treat one that
# is longer than a row; see gated_jax/data/chat.py.
TARGETS = ('assistant', 'last', 'all')
TOO_LONG = ('cut', 'drop')

# Settings that one kind of source alone reads.
ONLY_FOR = {
  'huggingface': ('hub_subset', 'hub_split', 'hub_revision', 'hub_streaming'),
  'conversations': ('targets', 'too_long'),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to rows of tokens. See gated_jax/data/pipeline.py."""

  ROLE: ClassVar[str] = 'execution'

  # 'stdlib': the running interpreter's own standard library. 'synthetic':
  # random spans that repeat. 'backcopy': sequences in which small models grow
  # sinks, a row each (gated_jax/data/backcopy.py). 'mixture': `mixture` below.
  # The rest read `paths`.
  source: str = 'stdlib'
  # Globs, comma-separated; ** is folders at any depth. Files may move: a
  # checkpoint's position in the data knows their names and sizes.
  paths: str = setting('', 'free')
  # Field of JSONL, Parquet and ArrayRecord examples, column of a data set of
  # source='huggingface', where 'messages' makes its rows conversations.
  column: str = 'text'
  # For source='mixture': entries 'weight:source:paths', weighted by tokens.
  mixture: tuple[str, ...] = ()
  # For conversations: which tokens are targets, those of the
  # assistant's turns, of the last of them, or all.
  targets: str = 'assistant'
  # For conversations: one that is longer than a row loses its
  # beginning ('cut') or is left out ('drop').
  too_long: str = 'cut'
  # For source='huggingface', where `paths` is a name on the hub or a folder:
  # configuration, split, and a branch, tag or commit; whether rows are streamed
  # instead of being downloaded first.
  hub_subset: str = ''
  hub_split: str = 'train'
  hub_revision: str = ''
  hub_streaming: bool = False
  tokenizer: str = 'bytes'  # 'bytes', or a path: tokenizer.json, *.model
  # The id that ends a document in arrays of ids; -1: as the JSON beside them or
  # the tokenizer says; -2: none does, and max_document alone cuts them.
  eos: int = -1
  # Text that spells a special token becomes that token. Documents can then
  # end themselves: this is for text written with such tokens on purpose.
  special_tokens: bool = False
  batch: int = 8  # rows per step, over all processes
  length: int = 256  # tokens per row
  # 'cut': documents end to end, each attending to itself alone. 'joined':
  # attention crosses documents, as in GPT-style runs. 'whole': no document is
  # cut that fits into a row, at the price of some padding.
  rows: str = 'cut'
  # For rows='joined': the id that every row begins with; -1: none.
  first_token: int = -1
  validation: float = 0.05  # share of documents held out, by their content
  max_document: int = 1 << 20  # bytes of text, or ids; longer ones are cut
  shuffle: bool = True
  # Tokens whose rows are shuffled among each other, beside the order of files.
  # Resuming packs that many again, and memory holds them three times, 20 bytes
  # each: in use, ready, and in the making.
  shuffle_tokens: int = 1 << 20
  seed: int = 0
  # Batches made ahead of the step; more of them where a window holds more.
  prefetch: int = setting(4, 'free')
  workers: int = setting(4, 'free')  # blocks of text tokenised at once

  def __post_init__(self) -> None:
    finite('data.', self)
    choice('data.source', self.source, (*SOURCES, 'mixture'))
    positive(
      **{
        f'data.{name}': getattr(self, name)
        for name in (
          'batch',
          'length',
          'max_document',
          'shuffle_tokens',
          'prefetch',
        )
      }
    )
    below_one(**{'data.validation': self.validation})
    choice('data.rows', self.rows, ROWS)
    choice('data.targets', self.targets, TARGETS)
    choice('data.too_long', self.too_long, TOO_LONG)
    if self.first_token < -1:
      raise ValueError(
        f'data.first_token={self.first_token} must be an id, or -1 for none'
      )
    if self.first_token >= 0 and self.rows != 'joined':
      raise ValueError(
        f'data.first_token={self.first_token} does nothing with '
        f"data.rows={self.rows!r}: it needs data.rows='joined'"
      )
    valid_seed(**{'data.seed': self.seed})
    if not -2 <= self.eos < 2**32:
      raise ValueError(f'data.eos={self.eos} must be an id, -1 or -2')
    if not 1 <= self.workers <= 1024:
      raise ValueError(f'data.workers={self.workers} must lie in [1, 1024]')
    if not self.tokenizer:
      raise ValueError("data.tokenizer='' must be 'bytes' or a path")
    if self.source == 'mixture':
      if not self.mixture:
        raise ValueError("data.source='mixture' needs data.mixture")
    elif self.mixture:
      raise ValueError(
        f'data.mixture={self.mixture} does nothing with '
        f'data.source={self.source!r}'
      )
    needs_paths = self.source not in ('stdlib', 'mixture', *MADE_UP)
    if needs_paths and not self.paths.strip(' ,'):
      raise ValueError(f'data.source={self.source!r} needs data.paths')
    if self.paths and not needs_paths:
      raise ValueError(
        f'data.paths={self.paths!r} does nothing with '
        f'data.source={self.source!r}'
      )
    sources = {name for _, part in self.parts() for name in part._kinds}
    for source, names in ONLY_FOR.items():
      for name in () if source in sources else names:
        value = getattr(self, name)
        if value != type(self).__dataclass_fields__[name].default:
          raise ValueError(
            f'data.{name}={value!r} does nothing without a source {source!r}'
          )

  @property
  def is_text(self) -> bool:
    """Tells whether all of it is text that the tokenizer reads."""
    return all(p.source != 'tokens' and not p.made_up for _, p in self.parts())

  @property
  def is_chat(self) -> bool:
    """True where documents are conversations."""
    rows = self.source == 'huggingface' and self.column == 'messages'
    return rows or self.source == 'conversations'

  @property
  def _kinds(self) -> tuple[str, ...]:
    """The sources whose own settings count for this one."""
    return (self.source, 'conversations') if self.is_chat else (self.source,)

  @property
  def made_up(self) -> bool:
    """True where ids stand for no text."""
    return self.source in MADE_UP

  def names(self) -> tuple[str, ...]:
    """Each source's name in metrics: its entry in the mixture, less the weight.

    An entry that stands twice has its place in the mixture before it.
    """
    if self.source != 'mixture':
      return (self.source,)
    plain = [str(entry).split(':', 1)[1] for entry in self.mixture]
    return tuple(
      f'{place}:{name}' if plain.count(name) > 1 else name
      for place, name in enumerate(plain)
    )

  def parts(self) -> tuple[tuple[float, 'DataConfig'], ...]:
    """Weight and settings of each source of the mixture, or of the only one."""
    if self.source != 'mixture':
      return ((1.0, self),)
    parts = []
    for entry in self.mixture:
      words = entry.split(':', 2) if isinstance(entry, str) else [entry]
      try:
        weight = float(words[0])
      except (TypeError, ValueError):
        weight = math.nan
      if len(words) < 2 or not (math.isfinite(weight) and weight > 0):
        raise ValueError(
          f"data.mixture entry {entry!r} must be 'weight:source:paths' with a "
          'positive weight'
        )
      choice(f'source of data.mixture entry {entry!r}', words[1], SOURCES)
      part = dataclasses.replace(
        self,
        source=words[1],
        paths=words[2] if len(words) == 3 else '',
        mixture=(),
      )
      parts.append((weight, part))
    return tuple(parts)
